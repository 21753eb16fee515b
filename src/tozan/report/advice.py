"""What to do next: the few sentences that a look at the numbers leads to."""

from __future__ import annotations

import re

from tozan.amounts import percent
from tozan.report.history import Event, History
from tozan.report.ranks import Ranks, Slow
from tozan.report.words import fall, middle

RULES = (
    (
        "data", 0.05,
        "Reading samples takes {share} of the time: put the shards on a local disk (on Fugaku `tozan launch --stage`), "
        "and see `tozan bench io`.",
    ),
    (
        "bubble", 0.10,
        "The pipeline stands still for {share} of the time: more micro-batches in a step (`train.accumulate`), or "
        "`layout.schedule` interleaved or zero-bubble.",
    ),
    (
        "wait/dp", 0.10,
        "Waiting for gradients takes {share}: more micro-batches between two sums (`train.accumulate`), or "
        "`train.deterministic = false`, which sums once a step.",
    ),
    (
        "wait/tp", 0.15,
        "Waiting inside tensor parallelism takes {share}: fewer ranks in `layout.tensor`, or those within one machine.",
    ),
    ("optimizer", 0.15, "Clipping and optimizer take {share}: `layout.zero = 1` shares them among replicas."),
    ("checkpoint", 0.03, "Checkpoints take {share} of the time: a larger `checkpoint.every`."),
    ("evaluation", 0.10, "Evaluation takes {share} of the time: a larger `eval.every`, or fewer `eval.samples`."),
)  # fmt: skip


def of_run(history: History, ranks: Ranks | None, slow: list[Slow]) -> list[str]:
    """What stands out of a run and what would change it, the costliest first."""
    shares = shares_of(history, ranks)
    said = [f"Look at the machine of {one}." for one in slow[:3]]
    if len(slow) > 3:
        said.append(f"{len(slow) - 3} further ranks are slow; the map of ranks and phases marks them.")
    found = [(value, text) for phase, least, text in RULES if (value := _total(shares, phase)) >= least]
    said += [text.format(share=percent(value)) for value, text in sorted(found, reverse=True)]
    which, first, last = fall(history)
    if first > 0 and last >= first and history.steps["step"].size > 20:
        said.append(f"The {which} did not fall: try a smaller or larger `optim.lr`, and look at the gradient norm.")
    mfu = middle(history.steps["mfu"])
    computing = shares.get("forward", 0.0) + shares.get("backward", 0.0)
    if not said and computing:
        said.append(
            f"Nothing stands out: {percent(computing)} of the time is forward and backward, at an MFU of "
            f"{percent(mfu)}. `tozan bench gemm` shows which matrix product is slowest."
        )
    return said


def shares_of(history: History, ranks: Ranks | None) -> dict[str, float]:
    """Share of each phase of the wall time, of all ranks or, without a breakdown, of rank 0."""
    if ranks is not None:
        return {name: ranks.share(name) for name in ranks.phases}
    total = float(history.steps["seconds"][history.steps["seconds"] > 0].sum())
    return {name: float(values.sum()) / total for name, values in history.phases.items()} if total else {}


def _total(shares: dict[str, float], phase: str) -> float:
    """A phase's share; of `wait/tp` with all its parts."""
    return sum(value for name, value in shares.items() if name == phase or name.startswith(f"{phase}_"))


def slow_events(history: History, slow: list[Slow]) -> list[Event]:
    """Slow ranks as events of the last step, but for those that the run itself has named."""
    last = int(history.steps["step"][-1]) if history.steps["step"].size else 0
    told = " ".join(event.text for event in history.events if event.event == "slow rank")
    return [Event(last, "slow rank", str(one)) for one in slow if not re.search(rf"\brank {one.rank}\b", told)]
