"""One gloo device for all groups of a process."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import spawn

GROUPS, SECONDS = 6, 0.5


def _wakeups():
    found = [path.read_text() for path in Path("/proc/self/task").glob("*/status")]
    return sum(int(text.split("\nvoluntary_ctxt_switches:")[1].split()[0]) for text in found)


def _idle(backend):
    """Wake-ups in a second of a rank of so many groups that does nothing, and what all of them at once have summed."""
    made = [dist.new_group(backend=backend) for _ in range(GROUPS)]
    parts = [torch.full((1000,), float(number)) for number in range(GROUPS)]
    for work in [dist.all_reduce(x, group=group, async_op=True) for x, group in zip(parts, made, strict=True)]:
        work.wait()
    before, begin = _wakeups(), time.monotonic()
    time.sleep(SECONDS)
    rate = (_wakeups() - before) / (time.monotonic() - begin)
    for group in made:
        dist.destroy_process_group(group)
    return rate, [x[0].item() for x in parts]


def test_a_rank_of_many_groups_wakes_no_more_often_than_one_of_one():
    each = spawn(2, _idle, "gloo")
    shared = spawn(2, _idle, None)
    assert [sums for _, sums in shared] == [sums for _, sums in each] == [[2.0 * n for n in range(GROUPS)]] * 2
    for (many, _), (few, _) in zip(each, shared, strict=True):
        assert few < many / 2
