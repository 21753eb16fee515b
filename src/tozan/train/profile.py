"""A trace of some steps, in the format that Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch


def silence() -> None:
    """Keep Kineto, PyTorch's tracer, from telling the terminal when it starts and stops; call before its first use."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class Profiler:
    """Traces the steps from `first` to `last`, both included; with an empty range it does nothing.

    The trace is written when the last of them ends, or when the run stops in between.
    """

    def __init__(self, steps: Sequence[int], path: Path) -> None:
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._path = path
        self._profile: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """Call before step number `step`, counted from 1 as in the metrics."""
        if step in self._steps and self._profile is None:
            silence()
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()

    def end(self, step: int) -> None:
        """Call after step number `step`."""
        if self._profile is not None and step + 1 not in self._steps:
            self._write()

    def _write(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._path))
            self._profile = None

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()
