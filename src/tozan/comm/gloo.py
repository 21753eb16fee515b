"""gloo with one device for all groups of a process.

PyTorch gives every process group a gloo device of its own: a listening socket, and a thread that wakes 100 times a
second whether anything comes or not. A mesh has a group for every axis, so a rank of eight groups would wake 800 times
a second for nothing. One device serves any number of groups (docs/lab-notes.md has the measurement); here it is made
once and given to all of them, by way of a backend of PyTorch's own class that is registered under another name.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroupGloo, Store

NAME = "tozan_gloo"


@cache
def backend() -> str:
    """The backend's name, for `init_process_group`; groups made from that group take after it."""
    dist.Backend.register_backend(NAME, _group, devices=["cpu", "cuda"])
    return NAME


def _group(store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroupGloo:
    make: Any = ProcessGroupGloo  # whose stubs know neither these options nor where they go
    options = make._Options()
    options._devices = _devices(os.environ.get("GLOO_SOCKET_IFNAME", ""))
    options._timeout = timeout
    made: ProcessGroupGloo = make(store, rank, size, options)
    return made


@cache
def _devices(interfaces: str) -> list[ProcessGroupGloo.Device]:
    """This process's devices, as PyTorch makes them: one for each interface named, or one for the host's own name."""
    if not interfaces:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",")]
