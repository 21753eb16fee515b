"""One rank of a job that tests start with a real launcher: sums in a loop, or misbehaves as it is told."""

import os
import sys
import time

import tozan  # noqa: F401 - before torch, as in `tozan train`  # isort: skip
import torch
import torch.distributed as dist

from tozan.comm import collectives as c
from tozan.comm.launch import join
from tozan.errors import UserError
from tozan.layout import Layout

ranks, role = int(sys.argv[1]), sys.argv[2]
timeout, start, lost, late = (
    float(os.environ.get(name, default)) for name, default in (("TIMEOUT", 60), ("START", 0), ("LOST", 3), ("LATE", 0))
)
late = late if os.environ.get("RANK") == "1" else 0.0
if role == "dies" and os.environ["RANK"] == "1":
    dist.init_process_group = lambda *_, **__: os._exit(9)
time.sleep(late)
try:
    with join(Layout(dp=ranks), timeout_s=timeout, start_s=start, lost_after_s=lost) as mesh:
        time.sleep(late)
        axis = mesh["dp"]
        total = c.all_reduce(torch.tensor([float(mesh.rank)]), axis, name="sum")
        cores = len(os.sched_getaffinity(0))
        print(f"rank {mesh.rank}: sum {total.item():g}, {cores} cores, {torch.get_num_threads()} threads", flush=True)
        mesh.monitor.settle()
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
