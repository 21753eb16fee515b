"""What interrupts a run: signals, and losses that are not finite."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch

from tozan.comm import Mesh, collectives
from tozan.errors import Problem, UserError


class StopSignal:
    """Turns the first SIGINT, SIGTERM or warning of the scheduler into a request to stop at the next step boundary.

    A second one acts at once, as it would have without this. Only the main thread can catch signals; elsewhere
    (a notebook's worker thread) this does nothing.

    Args:
        mesh: ranks that must stop together; None for one process.
        warning: name of the signal by which the scheduler warns, or `none`.
    """

    def __init__(self, mesh: Mesh | None = None, warning: str = "none") -> None:
        self.signals = (signal.SIGINT, signal.SIGTERM, *([signal.Signals[warning]] if warning != "none" else []))
        self.received: signal.Signals | None = None
        self._mesh = mesh
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        for number in self.signals:
            try:
                self._previous[number] = signal.signal(number, self._on_signal)
            except ValueError:
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop: a collective, so that all stop after the same step."""
        if self._mesh is None or self._mesh.world_size == 1:
            return self.received is not None
        asked = torch.tensor([int(self.received is not None)])
        if collectives.all_reduce(asked, self._mesh.everyone, name="stop?").item() and self.received is None:
            self.received = signal.SIGTERM
        return self.received is not None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}


class Interrupted(Exception):  # noqa: N818 - it is a stop that was asked for, not an error
    """The run stopped at a step boundary because of a signal; its state is saved.

    Attributes:
        signal: what was received.
    """

    def __init__(self, number: signal.Signals, step: int) -> None:
        self.signal = number
        super().__init__(f"stopped by {number.name} after step {step}; the same command continues from there")


class BadSteps:
    """Counts skipped steps in a row and ends the run when there are more than `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row: list[str] = []

    def record(self, step: int, skipped: str | None) -> None:
        """Take note of one step.

        Raises:
            UserError: more than `limit` steps in a row were skipped.
        """
        if skipped is None:
            self.in_a_row = []
            return
        self.in_a_row.append(f"step {step}: {skipped}")
        if len(self.in_a_row) > self.limit:
            raise UserError(
                Problem(
                    "train.max_bad_steps",
                    f"{len(self.in_a_row)} steps in a row had a loss or gradient that is not finite, "
                    f"the limit is {self.limit}; the last was {self.in_a_row[-1]}",
                    "lower optim.lr or lengthen optim.warmup; the weights in the newest checkpoint are finite",
                )
            )
