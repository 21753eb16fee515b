"""Multi-rank tests: `spawn(4, function, *args)` runs `function(*args)` on four gloo ranks and returns their results.

Ranks are forked from a fork server that has torch imported already, and are kept between calls (a process group is made
anew for each call), so a call costs some 50 ms. `function` must be importable: a function at the top of a test file.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

from tozan import files

PRELOADED = [
    "torch",
    "torch.distributed",
    "torch.testing",
    "tozan.models.gpt2",
    "tozan.models.llama",
    "tozan.train",
]
"""What every rank needs and would otherwise import for itself."""

_pools: dict[int, Pool] = {}


def fork_context():
    """What starts processes from the fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class RankError(AssertionError):
    """A rank raised, died or did not come back."""


def spawn(world_size, function, *args, timeout=60.0):
    """Results of `function(*args)` on every rank, in order of the ranks.

    Raises:
        RankError: with the traceback of every rank that raised, or the ranks that hang after `timeout` seconds.
    """
    pool = _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = Pool(world_size)
    try:
        return pool.run(function, args, timeout)
    except BaseException:
        _pools.pop(world_size).kill()
        raise


class Pool:
    def __init__(self, world_size):
        context = fork_context()
        self._stores = contextlib.ExitStack()
        self.folder = str(self._stores.enter_context(files.scratch("tozan-ranks-")))
        self.calls = 0
        self.ranks = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, world_size, self.folder), daemon=True)
            process.start()
            there.close()
            self.ranks.append((process, here))

    def run(self, function, args, timeout):
        self.calls += 1
        for _, pipe in self.ranks:
            pipe.send((self.calls, sys.path))
            pipe.send((function, args))
        deadline = time.monotonic() + timeout
        results, errors = {}, {}
        while len(results) + len(errors) < len(self.ranks) and time.monotonic() < deadline:
            for rank, (process, pipe) in enumerate(self.ranks):
                if rank in results or rank in errors or not pipe.poll(0.002):
                    continue
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionError):
                    process.join(1)
                    kind, value = "error", f"died with exit code {process.exitcode}\n"
                (results if kind == "result" else errors)[rank] = value
                if kind == "error":
                    # The others may hang for want of this one: they get a moment to report, too.
                    deadline = min(deadline, time.monotonic() + 1.0)
        if errors:
            raise RankError("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(errors.items())))
        hanging = sorted(set(range(len(self.ranks))) - set(results))
        if hanging:
            raise RankError(f"ranks {hanging} of {len(self.ranks)} did not come back within {timeout} s")
        return [results[rank] for rank in range(len(self.ranks))]

    def kill(self):
        for process, pipe in self.ranks:
            pipe.close()
            process.kill()
        for process, _ in self.ranks:
            process.join(5)
        self._stores.close()


def _serve(pipe, rank, world_size, folder):
    import torch
    import torch.distributed as dist

    from tozan.comm import gloo
    from tozan.train import machine

    torch.set_num_threads(1)
    machine.measure_gemm_rate = lambda *_: 1e12  # nobody looks at a rank's MFU, and to measure takes 0.3 s of each run
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    sys.stdin.close()
    gc.freeze()  # what was imported stays: to look through a million objects after each call would take 0.3 s
    while True:
        try:
            call, sys.path[:] = pipe.recv()
            function, args = pipe.recv()
        except EOFError:
            return
        store = dist.FileStore(str(Path(folder) / f"store-{call}"), world_size)
        try:
            dist.init_process_group(gloo.backend(), store=store, rank=rank, world_size=world_size)
            result = function(*args)
            dist.barrier()
            dist.destroy_process_group()
            pipe.send(("result", result))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
            if dist.is_initialized():
                dist.destroy_process_group()
        # Groups that are still in some cycle of references keep their threads.
        result = function = args = None
        gc.collect()


@atexit.register
def _close():
    for pool in _pools.values():
        pool.kill()
