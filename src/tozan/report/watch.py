"""`tozan watch`: a run on the terminal, from another process; reads the run's files and nothing else.

It may begin before the run has, and goes on when the run has ended, until Ctrl-C or, with `until_done`, the last step.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tozan.amounts import duration, many, percent
from tozan.amounts import seconds as short
from tozan.report import ranks
from tozan.report.live import Live
from tozan.report.words import phase_words

QUIET = 60.0
"""Seconds without a record after which a run that is not done is said to be silent, at least."""
EVENTS = 5
BAR = 28
COLOURS = {"forward": "blue", "backward": "cyan", "optimizer": "magenta", "data": "green", "bubble": "bright_black"}


class Watch:
    """What is known of a run by now; `poll` reads what has been written since.

    Args:
        run: its folder, which need not be there yet.
        console: where to draw.
    """

    def __init__(self, run: Path, console: Console | None = None) -> None:
        self.run = run
        self._console = console or Console(highlight=False)
        self._live = Live(0, Console(file=None, quiet=True), title=run.name)
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self._facts: dict[str, Any] = {}
        self._offset, self._rest = 0, b""
        self._seen = False
        self._ranks: ranks.Ranks | None = None

    def poll(self) -> None:
        """Read what is new."""
        self._facts = self._facts or _facts(self.run / "run.json")
        self._live.total_steps = int(self._facts.get("steps", 0))
        try:
            with (self.run / "metrics.jsonl").open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            self._take(line)
        if lines or self._ranks is None:
            self._ranks = ranks.read(self.run, ranks=self._facts.get("processes"))

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            return
        self._seen = True
        self._live.record(record)
        if record.get("kind") == "event":
            self._events.append(record)

    @property
    def done(self) -> bool:
        """Whether the last step is done."""
        return 0 < self._live.total_steps <= self._live.step

    def view(self) -> RenderableType:
        """One frame."""
        if not self._seen:
            return Panel(Text(f"waiting for {self.run / 'metrics.jsonl'}", style="dim"), title=str(self.run))
        parts: list[RenderableType] = [self._live.view(), Text(self._state(), style="dim")]
        if self._ranks is not None:
            parts += [Text(), self._phases(self._ranks)]
        slow = ranks.slow(self._ranks, self._stages) if self._ranks else []
        if slow:
            parts += [Text(), *(Text(f"slow: {one}", style="bold red") for one in slow[:2])]
        if self._events:
            parts += [
                Text(),
                *(Text(_said(event), style="dim", overflow="ellipsis", no_wrap=True) for event in self._events),
            ]
        return Panel(Group(*parts), title=str(self.run), title_align="left", border_style="dim", padding=(0, 1))

    @property
    def _stages(self) -> int:
        return int((self._facts.get("layout") or {}).get("pipeline", 1))

    def _state(self) -> str:
        """How old the last record and the last checkpoint are."""
        said = [many(self._facts.get("processes", 1), "process")]
        age = time.time() - (self.run / "metrics.jsonl").stat().st_mtime
        if self.done:
            said.append("done")
        elif age > max(QUIET, 10 * self._live.mean_seconds):
            said.append(f"silent for {duration(age)}: stopped, or stuck")
        else:
            said.append(f"last record {duration(age)} ago")
        saved = 0.0
        for path in (self.run / "checkpoints").glob("step-*"):
            with contextlib.suppress(OSError):  # the run deletes old ones
                saved = max(saved, path.stat().st_mtime)
        said.append(f"last checkpoint {duration(time.time() - saved)} ago" if saved else "no checkpoint yet")
        return "  ·  ".join(said)

    def _phases(self, found: ranks.Ranks) -> Table:
        """Where a step's time goes, mean over ranks."""
        total = float(found.wall.mean())
        table = Table.grid(padding=(0, 1))
        for name, seconds in found.means.items():
            if seconds < 0.004 * total:
                continue
            colour = "yellow" if name.startswith("wait/") else COLOURS.get(name, "white")
            bar = Bar(1.0, 0.0, seconds / total, width=BAR, color=colour, bgcolor="default")
            table.add_row(
                Text(phase_words(name)), bar, Text(f"{percent(seconds / total):>6}"), Text(short(seconds), style="dim")
            )
        return table

    def show(self, every: float = 1.0, until_done: bool = False) -> None:
        """Draw until Ctrl-C.

        Args:
            every: seconds between two looks at the files.
            until_done: leave when the last step is done.
        """
        with Screen(console=self._console, get_renderable=self.view, auto_refresh=False, screen=False) as screen:
            while True:
                self.poll()
                screen.refresh()
                if until_done and self.done:
                    return
                time.sleep(every)

    def once(self) -> None:
        """Draw one frame."""
        self.poll()
        self._console.print(self.view())


def _facts(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _said(event: dict[str, Any]) -> str:
    return f"step {event['step']:,}  {event.get('event')}: {event.get('text')}"
