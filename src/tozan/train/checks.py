"""The checks of a step: one small exchange before each update decides on every rank alike whether the step is good.

    checks.begin(step)              # before the batch is read
    ...                             # forward, backward, gradient norm
    checks.look()                   # before the gradients are waited for
    again = checks.judge(...)       # before the update: None, or why the step must be computed again
    ...                             # update, publish
    checks.keep(step + 1, written)  # after the update
    checks.confirm(step + 1)        # before that state is saved

Each rank sends a row of words (`Row`): how many of its tensors changed in memory, its own seconds, bits of loss and
norm, and checksums of what others hold as well. Every rank then has all rows and comes to the same decision without
another word. Because this is before the update, weights and optimizer state are still those of the step before:

* a tensor that changed, or replicas that differ: `SilentError`, to be answered by going back to a good state;
* an odd loss or norm, ranks that disagree on the norm, or the turn of a regular repetition: the step is computed again.
  Two equal results are believed: a genuine spike in the data comes out the same twice, an error of a moment does not.
"""

from __future__ import annotations

import math
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tozan.comm import Mesh, collectives
from tozan.comm.texts import all_gather_texts
from tozan.config.schema import Checks as Table
from tozan.layout import AXES
from tozan.ops.update import checksums
from tozan.optim.adamw import AdamW
from tozan.train.integrity import TURNS, Watch, combine, dissenters, held, signed
from tozan.train.outliers import Outliers
from tozan.train.split import Split
from tozan.train.stragglers import Stragglers

EXIT_SILENT = 15
"""Exit status of a run that ends because of a silent error."""
ATTEMPTS = 4
"""Times a step is computed at most, to find two equal results."""


class SilentError(RuntimeError):
    """Numbers are wrong without any system having complained: memory, arithmetic or a wire of a rank is at fault.

    Raised on every rank at the same step, before the update; weights and optimizer state of the named rank are not to
    be trusted.

    Attributes:
        ranks: who; all that may be meant where a majority could not tell.
        step: optimizer steps done when it was found.
        what: the tensor, or what else was wrong.
    """

    def __init__(self, ranks: Sequence[int], step: int, what: str) -> None:
        self.ranks, self.step, self.what = tuple(ranks), step, what
        who = "rank" if len(self.ranks) == 1 else "one of ranks"
        super().__init__(f"silent error on {who} {', '.join(map(str, self.ranks))} at step {step}: {what}")


@dataclass
class Row:
    """What a rank says of itself before an update; all 64-bit words.

    Attributes:
        changed: tensors whose bits changed since the last update.
        busy: its own time for the step in nanoseconds, waiting for others left out.
        loss: bits of the loss.
        norm: bits of the gradient norm.
        gradient: checksum of its summed gradients, in steps that are computed twice; else 0.
        work: checksum of its own losses and unsummed gradients, in such steps; else 0.
        copies: for each of `AXES`, a checksum of what is replicated along it; 0 for nothing.
    """

    changed: int = 0
    busy: int = 0
    loss: int = 0
    norm: int = 0
    gradient: int = 0
    work: int = 0
    copies: list[int] = field(default_factory=lambda: [0] * len(AXES))

    def words(self) -> list[int]:
        """The row as signed 64-bit integers."""
        row = [self.changed, self.busy, self.loss, self.norm, self.gradient, self.work, *self.copies]
        return [signed(word) for word in row]


CHANGED, BUSY, LOSS, NORM, GRADIENT, WORK, COPIES = range(7)
"""Columns of the exchanged table, (world, 6 + axes) int64."""
RESULT = [LOSS, NORM, GRADIENT]
REGULAR = "its number is due to be computed twice"


def bits(value: float) -> int:
    """The 64 bits of a float; the same for every NaN."""
    return int(struct.unpack("<Q", struct.pack("<d", math.nan if math.isnan(value) else value))[0])


class Checks:
    """All checks of one rank (see the module).

    Args:
        table: `[checks]` of the config.
        split: this rank's part of the model.
        optimizer: its optimizer.

    Attributes:
        events: (event, text) of what was found, to be written into the metrics; take with `take_events`.
    """

    def __init__(self, table: Table, split: Split, optimizer: AdamW) -> None:
        self._sync, self._mesh = split.sync, split.mesh
        device = next(split.model.parameters()).device
        memory = table.memory or ("all" if device.type == "cpu" else "rotating")
        turns = {"all": 1, "rotating": TURNS, "off": 1}[memory]
        self.watch = Watch(held(split, optimizer) if memory != "off" else (), turns)
        # Where repeating a step need not give the same bits, there is no point in it.
        exact = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        self._every = table.recompute if exact else 0
        self._outliers = Outliers(table.outlier) if table.outlier and exact else None
        self._stragglers = _stragglers(table, split.mesh)
        self._results: list[np.ndarray] = []
        self._twice, self._step = False, -1
        self._start = self._waited = self._tail = 0.0
        self.events: list[tuple[str, str]] = []

    def begin(self, step: int) -> None:
        """Before a step is computed, or computed again."""
        if self.watch.fresh:
            self.watch.keep(step)
        if step != self._step:
            self._results.clear()
        self._step = step
        self._twice = self._every > 0 and (step + 1) % self._every == 0
        self._sync.witness(self._twice)
        self._start, self._waited = time.perf_counter(), self._mesh.ledger.waited()

    def look(self) -> None:
        """Once the backward pass is under way: have the memory read that `judge` judges, without waiting for a GPU."""
        self.watch.look()

    def judge(self, step: int, loss: float, norm: float, losses: Sequence[float], *, overflow: bool) -> str | None:
        """Before the update: exchange, and decide. A collective.

        Args:
            step: optimizer steps done.
            loss: of the whole step.
            norm: of all gradients.
            losses: of this rank's own micro-batches.
            overflow: the loss scale was too high: nothing odd about a norm that is not finite.

        Returns:
            None if the step is good; else why it must be computed again.

        Raises:
            SilentError: on all ranks; names the rank, the tensor and the step.
        """
        changed = self.watch.changed()
        row = Row(len(changed), self._busy(), bits(loss), bits(norm), copies=self.watch.words)
        if self._twice:
            row.gradient, row.work = self._fingerprints(losses)
        table = self._exchange(row)
        self._blame(step, table, changed)
        again = self._repeat(step, table, overflow)
        if again is None:
            self._results.clear()
            self._notice(step, table)
        self._start, self._waited = time.perf_counter(), self._mesh.ledger.waited()
        return again

    def keep(self, step: int, written: Mapping[str, int] | None = None) -> None:
        """After the update, or where none was made: what is there now is right.

        Args:
            step: optimizer steps done.
            written: what `AdamW.step` returned; the rest is read.
        """
        self.watch.keep(step, written)
        self._tail = self._own_seconds()

    def confirm(self, step: int) -> None:
        """Before the state is saved or copied: nobody's memory has changed since the last update. A collective.

        Args:
            step: optimizer steps done.

        Raises:
            SilentError: as in `judge`; the state must not be kept.
        """
        if not self.watch.pieces:
            return
        changed = self.watch.changed()
        self._blame(step, self._exchange(Row(len(changed), copies=self.watch.words)), changed)

    def forget(self) -> None:
        """The state was replaced (a checkpoint was loaded): compare it with nothing, and begin to learn anew."""
        self.watch.forget()
        self._results.clear()
        if self._outliers:
            self._outliers.forget()

    def take_events(self) -> list[tuple[str, str]]:
        """What was found since the last call."""
        found, self.events = self.events, []
        return found

    def _own_seconds(self) -> float:
        """Since the last mark, without waiting for others."""
        waited = self._mesh.ledger.waited() - self._waited
        return max(time.perf_counter() - self._start - waited, 0.0)

    def _busy(self) -> int:
        return int((self._own_seconds() + self._tail) * 1e9)

    def _fingerprints(self, losses: Sequence[float]) -> tuple[int, int]:
        """Checksums of the summed gradients, and of what this rank alone has made."""
        gradients = [p.grad for p in self._sync.parameters.values() if p.grad is not None]
        gradient = combine(checksums(gradients), range(len(gradients)))
        sent = self._sync.witness(False)
        own = [bits(value) for value in losses]
        return gradient, combine([*own, gradient if sent is None else sent], range(len(own) + 1))

    def _exchange(self, row: Row) -> np.ndarray:
        """Every rank's row: (world, words)."""
        mine = torch.tensor([row.words()])
        if self._mesh.world_size == 1:
            return mine.numpy()
        return collectives.all_gather(mine, self._mesh.everyone, name="checks").numpy()

    def _blame(self, step: int, table: np.ndarray, changed: list[str]) -> None:
        """Raise if memory changed on some rank, or replicas differ."""
        guilty = np.flatnonzero(table[:, CHANGED]).tolist()
        if guilty:
            more = f" and {len(changed) - 1} more tensors" if len(changed) > 1 else ""
            said = f"{changed[0]}{more} changed in memory between two updates" if changed else ""
            raise SilentError(guilty, step, self._say(said, guilty))
        for number, axis in enumerate(AXES):
            if self._mesh.layout.sizes[axis] == 1:
                continue
            found = list(dissenters(table[:, COPIES + number], list(self._mesh.layout.sizes.values()), number))
            if found:
                ranks = sorted(rank for members, _ in found for rank in members)
                said = f"{self._first_difference(axis)} differs from its copies along {axis}"
                raise SilentError(ranks, step, self._say(said if self._mesh.rank in ranks else "", ranks))

    def _first_difference(self, axis: str) -> str:
        """Name of the first tensor that is not the same along an axis; a collective."""
        sums = self.watch.along(axis)
        line = self._mesh[axis]
        if axis == "pp":  # the stages between the two that hold a tied embedding have nothing to compare
            return self.watch.name_along(axis, next(iter(sums))) if sums else ""
        mine = torch.tensor([[signed(value) for value in (*sums.values(), 0)]])
        rows = collectives.all_gather(mine, line, name="checks").numpy()
        different = np.flatnonzero((rows != rows[0]).any(axis=0))
        return self.watch.name_along(axis, list(sums)[different[0]]) if len(different) else ""

    def _say(self, said: str, ranks: Sequence[int]) -> str:
        """The words of the first of these ranks, on every rank; a collective."""
        if said:
            said = f"{said} (host {socket.gethostname()})"
        return all_gather_texts(said, self._mesh.everyone, name="checks")[ranks[0]]

    def _repeat(self, step: int, table: np.ndarray, overflow: bool) -> str | None:
        """Why this step must be computed again, if so: the first result was suspicious, or no two are equal yet."""
        agreed = bool((table[:, NORM] == table[0, NORM]).all())
        odd = f"ranks disagree on the gradient norm: {len(np.unique(table[:, NORM]))} values" if not agreed else None
        if odd is None and self._outliers and not overflow:
            odd = self._outliers.judge(*_loss_and_norm(table))
        self._results.append(table)
        if len(self._results) == 1:
            return odd or (REGULAR if self._twice else None)
        if agreed and any((past[:, RESULT] == table[:, RESULT]).all() for past in self._results[:-1]):
            if len(self._results) > 2:
                self.events.append(("computing error", self._disagreement(step)))
            elif odd:
                self.events.append(("odd step", f"{odd}; computed again with the same result, and kept"))
            return None
        if len(self._results) == ATTEMPTS:
            raise SilentError(self._suspects(), step, f"{ATTEMPTS} computations of a step gave no two equal results")
        return self._disagreement(step)

    def _suspects(self) -> list[int]:
        """Ranks whose own work differed between the computations of this step; everyone if that was not kept."""
        stack = np.stack([table[:, WORK] for table in self._results])
        ranks: list[int] = np.flatnonzero((stack != stack[0]).any(axis=0)).tolist()
        return ranks or list(range(self._mesh.world_size))

    def _disagreement(self, step: int) -> str:
        suspects = self._suspects()
        who = f"rank {suspects[0]}" if len(suspects) == 1 else f"ranks {', '.join(map(str, suspects[:8]))}"
        who = who if len(suspects) < self._mesh.world_size or len(suspects) == 1 else "an unknown rank"
        return f"step {step + 1} came out differently when computed again: an error of computing on {who}"

    def _notice(self, step: int, table: np.ndarray) -> None:
        """Take an accepted step into what later ones are compared with."""
        if self._outliers:
            self._outliers.record(*_loss_and_norm(table))
        if self._stragglers and self._mesh.rank == 0:
            for change in self._stragglers.update(step + 1, (table[:, BUSY] / 1e9).tolist()):
                self.events.append(("slow rank" if not change.over else "slow rank recovered", str(change)))


def _loss_and_norm(table: np.ndarray) -> tuple[float, float]:
    """Those of rank 0, so that every rank judges the same."""
    loss, norm = struct.unpack("<dd", table[0, [LOSS, NORM]].tobytes())
    return loss, norm


def _stragglers(table: Table, mesh: Mesh) -> Stragglers | None:
    """The detector of slow ranks, where there are several; their work differs between pipeline stages."""
    if not table.slow or mesh.world_size == 1:
        return None
    return Stragglers([mesh.layout.coordinates(rank)["pp"] for rank in range(mesh.world_size)], table.slow)
