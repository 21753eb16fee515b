"""Measurements on a terminal: columns of numbers with metric prefixes. Torch-free."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tozan.amounts import many, percent, scaled
from tozan.bench.compare import Comparison
from tozan.bench.result import Peak, Result

WIDTH = 100
"""Columns that every page fits into."""


def binary(size: int) -> str:
    """Bytes in powers of 1,024: `64 KiB`, `1.5 GiB`."""
    for bits, name in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << bits:
            return f"{size / (1 << bits):.4g} {name}"
    return f"{size} B"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, wrap: int = 0) -> Table:
    """Rows under headings; all columns but the first `left` are set to the right, and column `wrap` alone may wrap."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, heading in enumerate(headings):
        made.add_column(heading, justify="left" if index < left else "right", no_wrap=index != wrap, overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def show(*parts: object) -> None:
    """Print tables and lines: with colours on a screen, plainly and `WIDTH` columns wide elsewhere."""
    screen = sys.stdout.isatty()
    width = max(60, min(shutil.get_terminal_size().columns, 160)) if screen else WIDTH
    console = Console(width=width, highlight=False, file=sys.stdout if screen else io.StringIO())
    for part in parts:
        console.print(Text(part) if isinstance(part, str) else part)
    if not screen:
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        print("\n".join(line.rstrip() for line in text.splitlines()))


def head(result: Result) -> str:
    """The first lines of a measurement: where and with what it was made."""
    machine = result.machine
    where = f"{machine['processor']}, {many(machine['cores'], 'core')}, {machine['memory_bytes'] / 2**30:.0f} GiB"
    what = ", ".join(f"{name} {version}" for name, version in result.versions.items() if name in ("tozan", "torch"))
    lines = [f"{where}; {what}"]
    if result.peaks:
        lines.append("best GEMM: " + ", ".join(f"{name} {rate_of_peak(peak)}" for name, peak in result.peaks.items()))
    if result.bandwidth:
        lines.append(f"memory: {scaled(result.bandwidth, 'B/s')} (copy, both ways counted)")
    return "\n".join(lines)


def rate_of_peak(peak: Peak) -> str:
    """A measured peak beside the nominal one: `420 GFLOP/s (92% of 456 GFLOP/s nominal)`."""
    nominal = peak.nominal
    share = f" ({percent(peak.measured / nominal)} of {scaled(nominal, 'FLOP/s')} nominal)" if nominal else ""
    return f"{scaled(peak.measured, 'FLOP/s')}{share}"


def foot(result: Result) -> str:
    """The notes, one on each line."""
    return "\n".join(f"· {note}" for note in result.notes)


def comparison(found: Comparison, anyway: bool = False) -> list[object]:
    """What `tozan bench compare` prints: warnings alone if the files are not alike, unless told to compare `anyway`."""
    lines: list[object] = [f"warning: {warning}" for warning in found.warnings]
    if not found.alike and not anyway:
        return [*lines, "not compared: another kind of measurement or machine (--anyway compares them)"]
    rows = [
        (
            one.name,
            scaled(one.a, one.unit),
            scaled(one.b, one.unit),
            f"{one.ratio:.3f}",
            f"{one.low:.3f} to {one.high:.3f}",
            one.verdict,
        )
        for one in found.differences
    ]
    if rows:
        lines.append(table(("row", "A", "B", "B / A", "spread", "verdict"), rows))
    counts = {verdict: sum(one.verdict == verdict for one in found.differences) for verdict in _VERDICTS}
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "no row in common")
    if found.missing:
        lines.append(f"in one file only: {', '.join(found.missing)}")
    return lines


_VERDICTS = ("differs", "within noise", "too few repeats", "other unit")
