"""One rank of a job that tests start with a real launcher: sums in a loop, or misbehaves as it is told."""

import os
import sys
import time

import tozan  # noqa: F401 - before torch, as in `tozan train`  # isort: skip
import torch

from tozan.comm import collectives as c
from tozan.comm.launch import join
from tozan.errors import UserError
from tozan.layout import Layout

ranks, role = int(sys.argv[1]), sys.argv[2]
try:
    with join(Layout(dp=ranks), timeout_s=float(os.environ.get("TIMEOUT", "60")), lost_after_s=3.0) as mesh:
        axis = mesh["dp"]
        total = c.all_reduce(torch.tensor([float(mesh.rank)]), axis, name="sum")
        cores = len(os.sched_getaffinity(0))
        print(f"rank {mesh.rank}: sum {total.item():g}, {cores} cores, {torch.get_num_threads()} threads", flush=True)
        if role == "loop" or (role == "idle" and mesh.rank != 1):
            for number in range(10**6):
                c.all_reduce(torch.zeros(1), axis, name=f"loop {number}" if role == "idle" else "loop")
                time.sleep(0.01)
        if role == "fail" and mesh.rank == 1:
            raise KeyError("wrong")
        if role == "fail":
            c.barrier(axis)
        if role == "idle":
            time.sleep(1000)
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
