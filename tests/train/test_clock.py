import time
from unittest.mock import patch

import pytest
import torch

from tozan.comm.ledger import Ledger
from tozan.train import clock as clocks
from tozan.train.clock import Clock, GpuTimeline


class Gpu:
    """A GPU whose work takes as long as one says: events come when it has done what was queued before them."""

    def __init__(self):
        self.done, self.waited = 0.0, []

    def work(self, seconds):
        self.done += seconds

    def event(self):
        return Event(self)


class Event:
    def __init__(self, gpu):
        self._gpu, self.at = gpu, None

    def record(self):
        self.at = self._gpu.done

    def elapsed_time(self, later):
        return (later.at - self.at) * 1e3

    def synchronize(self):
        self._gpu.waited.append(self.at)


def test_phases_sum_to_the_lap():
    clock = Clock()
    time.sleep(0.01)
    clock.mark("forward")
    time.sleep(0.02)
    clock.mark("backward")
    clock.mark("forward")
    time.sleep(0.01)
    before = time.perf_counter()
    seconds, phases = clock.lap()
    assert sum(phases.values()) == pytest.approx(seconds, rel=1e-9)
    assert set(phases) == {"forward", "backward", "other"}
    assert phases["backward"] >= 0.02
    assert clock.lap()[0] <= time.perf_counter() - before


def test_a_gpus_phases_are_its_own_and_it_is_waited_for_once_a_lap():
    gpu, ledger = Gpu(), Ledger()
    with patch.object(clocks, "timeline", lambda _: GpuTimeline(gpu.event)):
        clock = Clock(torch.device("cuda"), ledger)
    gpu.waited.clear()
    clock.trace = []
    for phase, seconds in (("forward", 3.0), ("backward", 5.0), ("forward", 2.0)):
        gpu.work(seconds)
        clock.mark(phase)
    assert gpu.waited == []
    gpu.work(0.5)
    seconds, phases = clock.lap()
    assert gpu.waited == [10.5]
    assert seconds == pytest.approx(10.5)
    assert phases == pytest.approx({"forward": 5.0, "backward": 5.0, "other": 0.5})
    assert [end - start for _, start, end in clock.trace] == pytest.approx([3.0, 5.0, 2.0, 0.5])
    gpu.work(1.0)
    assert clock.lap()[0] == pytest.approx(1.0)
