"""What came of the faults: a table for people and JSON for programs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tozan.amounts import many
from tozan.chaos.faults import HARMLESS, MEMORY_LOST, NODE_LOST, REDONE, TWICE, Fault


@dataclass
class Outcome:
    """One fault and what followed.

    Attributes:
        number: of the fault.
        kind: of the fault.
        step: in which it happened; None if it did not.
        detected: seconds until the agent knew of a loss; None if nothing was lost by it.
        lost: steps that every rank had begun and that had to be done again, the interrupted one included.
        recovery: seconds from knowing to the first step of the next generation.
        noticed: what the agent said was lost.
    """

    number: int
    kind: str
    step: int | None
    detected: float | None = None
    lost: int = 0
    recovery: float | None = None
    noticed: str = ""


@dataclass
class Report:
    """Everything about a run under faults.

    Attributes:
        outcomes: one per fault.
        steps: of the training.
        lost: steps done again.
        generations: how often the ranks were started.
        seconds: of the run in peace, and of the other.
        differences: what the two runs do not have in common, or what else went wrong.
        notes: how the faults were made.
    """

    outcomes: list[Outcome]
    steps: int
    lost: int
    generations: int
    seconds: tuple[float, float]
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def make(
        plan: list[Fault],
        fired: dict[int, tuple[int, int]],
        events: list[dict[str, Any]],
        steps: int,
        seconds: tuple[float, float],
    ) -> Report:
        """Join the faults with what the agent told.

        A loss belongs to the newest fault since the loss before it that is to cause one; without such a fault (a
        restart that was disturbed, a flipped bit that ended a process) to the newest one of any kind. A fault of a
        restart first kills a process for there to be a restart, which is not noted: that loss is its own, too.

        Args:
            plan: the script.
            fired: (when in ns, in which step) by number of the fault.
            events: what the agent told.
            steps: of the training.
            seconds: of the run in peace, and of the other.
        """
        outcomes = {
            f.number: Outcome(f.number, f.kind, fired[f.number][1] if fired[f.number][0] else None) for f in plan
        }
        order = sorted((when, number) for number, (when, _) in fired.items() if when)
        lost = since = 0
        culprit: Outcome | None = None
        for event in events:
            if event["event"] == "lost":
                before = [(when, outcomes[number]) for when, number in order if when <= event["at"]]
                new = [o for when, o in before if when > since and o.kind not in HARMLESS]
                ahead = [outcomes[number] for _, number in order[len(before) :][:1]]
                new = new or [o for o in ahead if o.kind in TWICE]
                culprit = next(reversed(new or [o for _, o in before]), None)
                since = event["at"]
                if culprit and culprit.detected is None and fired[culprit.number][0] <= event["at"]:
                    culprit.detected = (event["at"] - fired[culprit.number][0]) / 1e9
                    culprit.noticed = event["what"]
            elif event["event"] == "grows":
                culprit = None
            elif event["event"] == "resumed":
                lost += event["lost"]
                if culprit:
                    culprit.lost += event["lost"]
                    culprit.recovery = event["seconds"]
        for outcome in outcomes.values():
            if outcome.kind in REDONE and outcome.step is not None and outcome.recovery is None:
                outcome.lost += 1  # taken twice, without a restart
                lost += 1
        generations = max((event["generation"] for event in events), default=1)
        report = Report(list(outcomes.values()), steps, lost, generations, seconds)
        report.differences += [f"fault {o.number} ({o.kind}) did not happen" for o in report.outcomes if o.step is None]
        report.differences += [
            f"fault {o.number} ({o.kind}) in step {o.step} cost {many(o.lost, 'step')}"
            for o in report.outcomes
            if o.lost > (2 if o.kind in TWICE else 1) and o.kind not in MEMORY_LOST | NODE_LOST
        ]
        return report

    @property
    def useful(self) -> float:
        """Share of the steps begun that were not done again."""
        return self.steps / (self.steps + self.lost)

    @property
    def passed(self) -> bool:
        """Whether nothing differed, nothing was lost beyond a step per fault, and 97% of the steps were useful."""
        return not self.differences and self.useful >= 0.97

    def table(self) -> str:
        """By kind: faults, how soon known and by what most often, steps lost, seconds to recover."""
        titles = f"{'kind':<34}{'faults':>7}{'known after':>13}{'steps lost':>12}{'recovered in':>14}"
        lines = [f"{titles}  noticed, mostly"]
        for kind, count in sorted(Counter(o.kind for o in self.outcomes).items()):
            mine = [o for o in self.outcomes if o.kind == kind]
            detected = [o.detected for o in mine if o.detected is not None]
            recovery = [o.recovery for o in mine if o.recovery is not None]
            known = f"{median(detected):.3f} s" if detected else "-"
            took = f"{median(recovery):.2f} s" if recovery else "-"
            how = Counter(o.noticed for o in mine if o.noticed).most_common(1)
            figures = f"{count:>7}{known:>13}{sum(o.lost for o in mine):>12}{took:>14}"
            lines.append(f"{kind:<34}{figures}  {how[0][0] if how else '-'}")
        peace, hurt = self.seconds
        lines += [
            "",
            f"{many(len(self.outcomes), 'fault')} over {self.steps:,} steps, "
            f"{many(self.generations - 1, 'restart')}, 0 manual actions",
            f"{many(self.lost, 'step')} done again: {self.useful:.1%} of the steps were useful",
            f"{peace:.0f} s in peace, {hurt:.0f} s under faults",
            *self.notes,
        ]
        if self.differences:
            lines += [f"{len(self.differences)} differences:", *(f"  {text[:300]}" for text in self.differences[:20])]
        else:
            lines.append("final weights, optimizer state, counters and every step's record are equal to the bit")
        return "\n".join([*lines, "passed" if self.passed else "FAILED"])

    def write(self, out: Path) -> None:
        """Leave `report.json` and `report.txt` in a folder."""
        words = asdict(self) | {"format": "tozan chaos", "version": 1, "useful": self.useful, "passed": self.passed}
        (out / "report.json").write_text(json.dumps(words, indent=1) + "\n")
        (out / "report.txt").write_text(self.table() + "\n")
