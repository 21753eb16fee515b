"""Training: a run is assembled (`run`), looped over (`loop`) and taken one step at a time (`step`)."""

from __future__ import annotations

from tozan.comm.launch import join
from tozan.config import Loaded
from tozan.train.checks import EXIT_SILENT, SilentError
from tozan.train.deadline import Deadline
from tozan.train.evaluate import evaluate, held_out, open_model
from tozan.train.faults import Interrupted
from tozan.train.loop import Result, fit
from tozan.train.run import Listener, Run, assemble, shape_of
from tozan.train.split import mesh_layout, require_fit

__all__ = [
    "EXIT_SILENT",
    "Interrupted",
    "Listener",
    "Result",
    "Run",
    "SilentError",
    "assemble",
    "evaluate",
    "fit",
    "held_out",
    "open_model",
    "train",
]


def train(loaded: Loaded, on_record: Listener | None = None) -> Result:
    """Train the run that a config describes, from its newest checkpoint if it has one.

    Args:
        loaded: from `tozan.config.load`.
        on_record: called with each metrics record as it is written, e.g. by a live display.

    Returns:
        Where the run is and how it ended.

    Raises:
        UserError: config, data and checkpoint do not fit together, or the loss stayed not finite.
        Interrupted: a signal asked the run to stop; its state is saved.
        SilentError: bits changed in memory and there is no going back.
    """
    require_fit(loaded.config, shape_of(loaded), loaded.origin.get("layout.data", "layout"))
    table = loaded.config.layout
    with (
        join(
            mesh_layout(loaded.config),
            timeout_s=table.timeout,
            start_s=table.start_timeout,
            threads=loaded.config.train.threads,
            debug=table.debug,
        ) as mesh,
        Deadline.of(loaded.config, mesh) as deadline,
    ):
        return fit(assemble(loaded, mesh), on_record, deadline)
