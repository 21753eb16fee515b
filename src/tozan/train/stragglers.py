"""Who is slow: each rank's own time per step, waiting left out, against the ranks that have the same work.

Ranks of one pipeline stage have the same work, so their own times should be alike, whatever slows all of them at once:
a rank's excess is the logarithm of its time over the median of the others'. A rank that is alone in its stage is
compared with the others that are, after each one's usual excess has been taken off. A rank is slow when the mean of
the middle half of its last `WINDOW` excesses is above `limit`, and above what the noise of that mean gives.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 18
"""Steps that are judged together: many against noise, few enough to speak within 20."""
MEMORY = 64
"""Steps from which the noise is estimated."""
LEARN = 40
"""Steps in which ranks that have no equals show their usual excess."""
SKIP = 3
"""First steps, which allocate and warm up, are no measure."""


@dataclass(frozen=True)
class Slow:
    """A rank became slow, or is itself again.

    Attributes:
        rank: who.
        excess: by how much it is slower than its equals: 0.25 is a quarter more time per step.
        since: the step at which it began.
        over: the rank is as fast as the others again.
    """

    rank: int
    excess: float
    since: int
    over: bool = False

    def __str__(self) -> str:
        if self.over:
            return f"rank {self.rank} is as fast as its equals again"
        return f"rank {self.rank} is {self.excess:.0%} slower than its equals since step {self.since}"


class Stragglers:
    """Finds slow ranks from everyone's own seconds per step.

    Args:
        roles: for every rank, what its work is (its pipeline stage); equal roles have equal work.
        limit: a rank is slow if it takes this much longer than its equals: 0.075 is 7.5%.
    """

    def __init__(self, roles: Sequence[int], limit: float) -> None:
        members: dict[int, list[int]] = {}
        for rank, role in enumerate(roles):
            members.setdefault(role, []).append(rank)
        self._groups = [np.array(ranks) for ranks in members.values() if len(ranks) > 1]
        self._alone = np.array([ranks[0] for ranks in members.values() if len(ranks) == 1], dtype=int)
        self._limit = math.log1p(limit)
        # The largest of n normal values is near √(2 ln n) deviations: here of all ranks in a thousand windows.
        self._sigmas = math.sqrt(2 * math.log(len(roles) * 1000))
        self._excess: deque[np.ndarray] = deque(maxlen=MEMORY)
        self._learnt: list[np.ndarray] = []
        self._steps = 0
        self._slow: set[int] = set()

    def update(self, step: int, seconds: Sequence[float]) -> list[Slow]:
        """Take one step's own seconds of every rank, and return what has changed."""
        self._steps += 1
        if self._steps <= SKIP:
            return []
        times = np.log(np.maximum(np.asarray(seconds, dtype=float), 1e-9))
        excess = np.zeros_like(times)
        for members in (*self._groups, self._alone):
            excess[members] = _above_others(times[members])
        excess[self._alone] -= self._usual(excess[self._alone])
        self._excess.append(excess)
        return self._judge(step, np.stack(self._excess)) if len(self._excess) >= WINDOW else []

    def _usual(self, excess: np.ndarray) -> np.ndarray:
        """What ranks without equals exceed each other by from the beginning; while it is learnt, whatever they do."""
        if len(self._learnt) < LEARN:
            self._learnt.append(excess)
            return excess
        return _middle(np.stack(self._learnt))

    def _judge(self, step: int, past: np.ndarray) -> list[Slow]:
        window = past[-WINDOW:]
        middle = _middle(window)
        # σ from the differences of neighbours, which a rank that becomes slow changes once: of normal values, 1.4826
        # times the median distance from 0 is σ·√2. The mean of the middle half of n has a standard error of 1.1 σ/√n.
        sigma = 1.4826 * np.median(np.abs(np.diff(past, axis=0)), axis=0) / math.sqrt(2)
        limits = np.maximum(self._limit, self._sigmas * 1.1 * np.maximum(sigma, np.median(sigma)) / math.sqrt(WINDOW))
        found = []
        for rank in map(int, np.flatnonzero(middle > limits)):
            if rank not in self._slow:
                self._slow.add(rank)
                since = step - WINDOW + 1 + _onset(window[:, rank])
                found.append(Slow(rank, math.expm1(float(np.median(window[since - step - 1 :, rank]))), since))
        for rank in sorted(self._slow):
            if middle[rank] < limits[rank] / 2:
                self._slow.discard(rank)
                found.append(Slow(rank, math.expm1(float(middle[rank])), step, over=True))
        return found


def _above_others(values: np.ndarray) -> np.ndarray:
    """Each value minus the median of the others."""
    if len(values) < 2:
        return np.zeros_like(values)
    order = np.argsort(values)
    place = np.empty_like(order)
    place[order] = np.arange(len(values))
    ordered = values[order]
    low, high = (len(values) - 2) // 2, (len(values) - 1) // 2
    others = (ordered[low + (low >= place)] + ordered[high + (high >= place)]) / 2
    return np.asarray(values - others)


def _middle(window: np.ndarray) -> np.ndarray:
    """Mean of the middle half of the rows, for each column."""
    quarter = len(window) // 4
    return np.asarray(np.sort(window, axis=0)[quarter : len(window) - quarter].mean(axis=0))


def _onset(excess: np.ndarray) -> int:
    """Where a series becomes high: after the lowest point of its cumulative sum about half of its height."""
    high = float(np.median(excess[-(WINDOW // 2) :]))
    sums = np.concatenate(([0.0], np.cumsum(excess - high / 2)))
    return int(sums.argmin()) if sums.argmin() < len(excess) else 0
