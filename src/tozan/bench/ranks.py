"""Local processes to measure with: each runs one function, rank 0's answer comes back as JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tozan import files
from tozan.comm import gloo, processor

PRELOADED = ["torch", "torch.distributed", "tozan.bench.collectives", "tozan.bench.backends"]
"""What every rank would otherwise import for itself."""

Function = Callable[..., Any]
"""Called as `function(rank, ranks, folder, *arguments)`; at the top of a module, since processes look it up by name."""


def spawn(ranks: int, function: Function, *arguments: Any) -> Any:
    """Run a function in `ranks` local processes and return what rank 0 returned.

    Args:
        ranks: processes.
        function: what each runs; what rank 0 returns must be JSON.
        arguments: passed on.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed; the others are ended.
    """
    with files.scratch("tozan-bench-") as folder:
        given = (ranks, folder, processor.cores(), function, arguments)
        # A fork server imports PyTorch once for all ranks.
        multiprocessing.set_forkserver_preload(PRELOADED)
        mp.start_processes(_serve, given, ranks, start_method="forkserver")  # type: ignore[attr-defined, no-untyped-call]
        return json.loads((folder / "answer.json").read_text(encoding="utf-8"))


def _serve(rank: int, ranks: int, folder: Path, cores: int, function: Function, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(max(1, cores // ranks))
    answer = function(rank, ranks, folder, *arguments)
    if rank == 0:
        (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


@contextmanager
def group(
    rank: int,
    ranks: int,
    folder: Path,
    name: str,
    *,
    interface: str = "lo",
    backend: str | None = None,
    seconds: float = 60,
) -> Iterator[None]:
    """The default process group inside the block, over one network interface.

    Args:
        rank: of this process.
        ranks: in all.
        folder: seen by all ranks.
        name: of the group; each name once in a folder.
        interface: network interface that gloo sends through.
        backend: PyTorch's name of it; by default the trainer's.
        seconds: that an operation may take.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    method = f"file://{folder / name}"
    patience = timedelta(seconds=seconds)
    dist.init_process_group(
        backend or gloo.backend(), init_method=method, rank=rank, world_size=ranks, timeout=patience
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
