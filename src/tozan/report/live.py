"""What a terminal shows while a run goes on: a live view on a screen, plain lines in a log file."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live as Screen
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tozan.amounts import duration, percent, scaled

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 48


class Live:
    """Shows records as they are written. On a screen a view of a few lines is redrawn twice a second at most.

    Elsewhere (a pipe, a batch job's log) events and evaluations are one line each, and steps one line each `every`
    seconds at most, so that the log of a long run stays readable.

    Args:
        total_steps: steps in the whole run, for progress and the time left.
        console: where to write. Default: standard output.
        every: least seconds between two lines about steps when not on a screen.
        title: a name for the run.
    """

    def __init__(
        self, total_steps: int, console: Console | None = None, every: float = 5.0, title: str = "training"
    ) -> None:
        self.total_steps = total_steps
        self.title = title
        self._console = console or Console(highlight=False)
        self._every = every
        self._said = -math.inf
        self._step: dict[str, Any] = {}
        self._held_out: dict[str, Any] = {}
        self._seconds: deque[float] = deque(maxlen=50)
        self._losses: deque[float] = deque(maxlen=20_000)
        self._screen: Screen | None = None
        if self._console.is_terminal:
            self._screen = Screen(console=self._console, get_renderable=self.view, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self._screen:
            self._screen.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._screen:
            self._screen.stop()

    def record(self, record: dict[str, Any]) -> None:
        """Take a record of `metrics.jsonl`: a step, an evaluation or an event."""
        kind = record.get("kind")
        if kind == "step":
            self._take_step(record)
        elif kind == "eval":
            self._held_out = record
            self._print(
                f"{_place(record)}  held-out loss {_number(record, 'loss')}  perplexity {_number(record, 'perplexity')}"
            )
        elif kind == "event":
            self._print(f"{_place(record)}  {record.get('event')}: {record.get('text')}")

    def _take_step(self, record: dict[str, Any]) -> None:
        self._step = record
        seconds = _float(record, "seconds")
        if math.isfinite(seconds):
            self._seconds.append(seconds)
        if math.isfinite(loss := _float(record, "loss")):
            self._losses.append(loss)
        if record.get("skipped"):
            self._print(f"{_place(record)}  skipped: {record['skipped']}")
        now = time.monotonic()
        if self._screen is None and (now - self._said >= self._every or record["step"] == self.total_steps):
            self._said = now
            self._print(self.line())

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self._step.get("step", 0))

    @property
    def mean_seconds(self) -> float:
        """Of the last 50 steps; 0 before the first."""
        return statistics.fmean(self._seconds) if self._seconds else 0.0

    @property
    def seconds_left(self) -> float:
        """Expected seconds to the end of the run, from the mean of the last 50 steps; NaN before the first."""
        if not self._seconds:
            return math.nan
        return statistics.fmean(self._seconds) * (self.total_steps - int(self._step.get("step", 0)))

    @property
    def _left(self) -> str:
        if not self._step:
            return "starting"
        return f"{duration(self.seconds_left)} left" if self._step["step"] < self.total_steps else "done"

    def line(self) -> str:
        """The latest step in one line."""
        step = self._step
        place = f"{step.get('step', 0):>{len(str(self.total_steps))}}/{self.total_steps}"
        return (
            f"step {place}  loss {_number(step, 'loss')}  "
            f"{_float(step, 'tokens_per_second'):,.0f} tokens/s  "
            f"{scaled(_float(step, 'model_flops_per_second'), 'FLOP/s')}  MFU {percent(_float(step, 'mfu'))}  "
            f"lr {_float(step, 'lr'):.2e}  {self._left}"
        )

    def view(self) -> Group:
        """The live view: a bar, the numbers, and the curve of the loss so far."""
        step = self._step
        done = step.get("step", 0)
        head = Table.grid(padding=(0, 2), expand=False)
        head.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=self.total_steps, completed=done, width=32),
            Text(f"step {done:,}/{self.total_steps:,}"),
            Text(self._left, style="dim"),
        )
        numbers = Table.grid(padding=(0, 3))
        cells = {
            "loss": _number(step, "loss"),
            "held-out": _number(self._held_out, "loss"),
            "tokens/s": f"{_float(step, 'tokens_per_second'):,.0f}" if step else "—",
            "model": scaled(_float(step, "model_flops_per_second"), "FLOP/s"),
            "MFU": percent(_float(step, "mfu")),
            "lr": f"{_float(step, 'lr'):.1e}" if step else "—",
        }
        numbers.add_row(*(Text(name, style="dim") for name in cells))
        numbers.add_row(*(Text(value) for value in cells.values()))
        return Group(head, numbers, Text.assemble(("loss so far  ", "dim"), (sparkline(list(self._losses)), "cyan")))


def sparkline(values: list[float], width: int = SPARK_WIDTH) -> str:
    """A curve of block characters: the mean of each of `width` equal parts, from the lowest (▁) to the highest (█)."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [len(values) * index // width for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    reach = (high - low) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int(len(BARS) * (mean - low) / reach))] for mean in means)


def _place(record: dict[str, Any]) -> str:
    return f"step {record.get('step', 0)}"


def _float(record: dict[str, Any], name: str) -> float:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def _number(record: dict[str, Any], name: str) -> str:
    value = _float(record, name)
    return f"{value:.4g}" if math.isfinite(value) else "—"
