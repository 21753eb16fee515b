"""Pages and figures from a run's files; torch-free, so that a login node or a laptop can draw them."""

from __future__ import annotations

from pathlib import Path


def write(run: Path, out: Path | None = None, sample: str | None = None) -> Path:
    """Write a run's page; see `page.write`. Figures (and their library) are imported only now."""
    from tozan.report import page

    return page.write(run, out, sample)
