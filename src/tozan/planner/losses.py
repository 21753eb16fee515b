"""What a run loses to failed nodes, and to the checkpoints that it writes against them."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from tozan.amounts import duration, percent, seconds
from tozan.models.arithmetic import Shape, parameters
from tozan.planner.machine import Machine


@dataclass(frozen=True)
class Losses:
    """Failures and checkpoints of one run.

    Attributes:
        share: of the run's time that is lost: writing checkpoints, computing again and restarts.
        between: mean seconds between two failures of any of its nodes.
        write: seconds that a checkpoint takes to write.
        interval: seconds between checkpoints that lose the least.
    """

    share: float
    between: float
    write: float
    interval: float

    def __str__(self) -> str:
        return (
            f"{percent(self.share)} for failures and checkpoints: on average one of the nodes fails every "
            f"{duration(self.between)}, a checkpoint every {duration(self.interval)} takes {seconds(self.write)} "
            "to write (Young, Daly)"
        )


def losses(machine: Machine, shape: Shape, devices: int) -> Losses:
    """What a run on so many devices loses.

    Daly's first-order optimum (FGCS 2006, after Young 1974): a checkpoint every √(2 δ M) seconds, δ the time to write
    one, M the mean time between failures of all nodes. Lost: writing, half an interval and a restart per failure. A
    background writer hides part of δ; this is the pessimistic side.
    """
    economy = machine.economy
    nodes = max(1, devices // machine.node.devices)
    between = economy.node_mtbf_hours * 3600 / nodes
    write = 12 * parameters(shape) / min(nodes * economy.storage_bandwidth, economy.storage_total)
    interval = sqrt(2 * write * between)
    share = write / interval + (interval / 2 + economy.restart_seconds) / between
    return Losses(share, between, write, interval)
