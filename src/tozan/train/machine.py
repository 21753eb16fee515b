"""The process and the machine under it: allocator, threads, and the GEMM rate that MFU is measured against."""

from __future__ import annotations

import ctypes
import json
import math
import os
import socket
import time
from collections.abc import Sequence

import psutil
import torch

from tozan.comm import Mesh
from tozan.comm.processor import cores, cpuinfo
from tozan.comm.processor import name as processor_name
from tozan.comm.texts import all_gather_texts
from tozan.errors import Problem, UserError
from tozan.ops import native, product, product_reference, tiles

MALLOPT = {"M_MMAP_THRESHOLD": 1 << 30, "M_TRIM_THRESHOLD": (1 << 31) - 1, "M_TOP_PAD": 64 << 20}
"""What glibc is told so that it keeps freed blocks in the process, in bytes."""
_NUMBERS = {"M_TRIM_THRESHOLD": -1, "M_TOP_PAD": -2, "M_MMAP_THRESHOLD": -3}
"""Of these parameters, from glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed blocks instead of returning them to the kernel at every step.

    By default each activation is mapped, page-faulted in and unmapped again, which costs a training step up to half its
    speed. Returns False where the C library is not glibc (nothing is changed then).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    accepted = [mallopt(_NUMBERS[name], value) == 1 for name, value in MALLOPT.items()]
    return all(accepted)


def set_allocator() -> None:
    """Have freed memory kept in the process, and tensors made in an arena of their own where that can be compiled."""
    keep_freed_memory()
    native.arena()


def prepare(
    threads: int | None,
    deterministic: bool,
    kernels: native.Choice = "auto",
    *,
    compiled: bool = False,
    device: torch.device | None = None,
) -> None:
    """Set this process up for training: allocator, thread count, determinism, kernels.

    Args:
        threads: threads for computing; 0 means every core this process may run on, None leaves them as they are.
        deterministic: refuse operations whose bits differ from run to run.
        kernels: compiled ones where they can be had, or `plain` PyTorch.
        compiled: by torch.compile, which then is to be deterministic, too.
        device: which computes, if it is known.
    """
    native.choose(kernels)
    set_allocator()
    if threads is not None:
        torch.set_num_threads(threads or cores())
    if compiled:
        torch.use_deterministic_algorithms(deterministic)
    else:  # the same without importing the compiler to tell it
        torch.set_deterministic_debug_mode("error" if deterministic else "default")
    # Filling fresh memory with NaN is a debugging aid of that mode; it would double the memory traffic.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if deterministic and device and device.type == "cuda":
        allow_products(device)


def allow_products(device: torch.device) -> None:
    """Satisfy PyTorch that a GPU's products are deterministic, as they are with the workspace that it gives cuBLAS.

    It asks for a variable of the environment at the first product only, but reads it again by a regular expression at
    every product as long as it is there, which takes as long as a product of a small model.
    """
    name = "CUBLAS_WORKSPACE_CONFIG"
    if name not in os.environ:
        os.environ[name] = ":4096:8"
        torch.ones(1, 1, device=device).mm(torch.ones(1, 1, device=device))
        del os.environ[name]


def choose_device(name: str, mesh: Mesh | None = None) -> torch.device:
    """The device called `cpu`, `cuda` or `auto` (a GPU where there is one); of several ranks each has a GPU of its own.

    Args:
        name: what the config says.
        mesh: the ranks, all of which call this alike; None for a process that is alone.

    Raises:
        UserError: more ranks on a machine than GPUs, or GPUs on some machines only.
    """
    gpus = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if mesh is None or mesh.world_size == 1 or name == "cpu":
        return torch.device("cuda" if gpus or name == "cuda" else "cpu")
    seen = [str(torch.cuda.get_device_properties(number).uuid) for number in range(gpus)]
    said = all_gather_texts(json.dumps([socket.gethostname(), seen]), mesh.everyone, name="GPUs")
    number = own_gpu(mesh.rank, [json.loads(text) for text in said])
    if number is None:
        return torch.device("cpu")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def agree_on_tiles(mesh: Mesh) -> None:
    """Have all ranks do products, and attention, in bf16 on AMX tiles, or none, since replicas need the same bits.

    A collective. Ranks that share a cache of kernels agree anyway; of nodes with caches of their own each has timed the
    tiles for itself.
    """
    tiles.allow(tiles.TASKS)
    if mesh.world_size > 1:
        able = " ".join(task for task in tiles.TASKS if tiles.library(task))
        said = all_gather_texts(able, mesh.everyone, name="kernels")
        tiles.allow([task for task in tiles.TASKS if all(task in text.split() for text in said)])


def own_gpu(rank: int, seen: Sequence[tuple[str, list[str]]]) -> int | None:
    """Which of the GPUs that it sees a rank takes.

    Ranks of a machine that see the same ones share them out in order; where the launcher gave each its own, as Slurm's
    `--gpus-per-task` does, that is kept.

    Args:
        rank: this one.
        seen: by rank, its machine's name and the GPUs that it sees.

    Returns:
        The GPU's number on this rank; None if no rank sees any.

    Raises:
        UserError: more ranks than GPUs, or some ranks see none.
    """
    sharing: dict[tuple[str, ...], list[int]] = {}
    for other, (host, gpus) in enumerate(seen):
        sharing.setdefault((host, *gpus), []).append(other)
    if all(not gpus for _, gpus in seen):
        return None
    ranks, fix = len(seen), 'or set train.device = "cpu"'
    problems = []
    for (host, *gpus), mates in sharing.items():
        if len(mates) > len(gpus):
            nodes = next((n for n in range(1, ranks + 1) if ranks % n == 0 and ranks // n <= len(gpus)), None)
            what = f"{_count(len(mates), 'rank')} on {host}, which has {_count(len(gpus), 'GPU')}"
            more = f"use {nodes} nodes for {ranks} ranks" if nodes else "use nodes that all have GPUs"
            problems.append(Problem("train.device", f"{what}: each needs one", f"{more}, {fix}"))
    if problems:
        raise UserError(*problems)
    host, gpus = seen[rank]
    return sharing[host, *gpus].index(rank)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def measure_gemm_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """The best FLOP/s of a square matrix product, over about `seconds`.

    The size grows from 256 until one product takes a twentieth of the time, at most to 8,192. Operands are random:
    matrix units run faster on zeros. Where tozan's products run on AMX tiles, PyTorch's compete: they may be the faster
    ones for a square though not for a layer.
    """
    on_cpu = device.type == "cpu" and dtype == torch.bfloat16 and native.usable()
    makers = (product_reference, product) if on_cpu and tiles.library("products") else (product,)
    generator = torch.Generator(device).manual_seed(0)
    size, best, end = 256, 0.0, math.inf
    a = b = torch.empty(0)
    while time.perf_counter() < end:
        if a.shape[0] != size:
            a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
            product(a, b.T, dtype)
        for make in makers:
            start = time.perf_counter()
            end = min(end, start + seconds)  # the first product may compile its kernel
            make(a, b.T, dtype)
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - start
            best = max(best, 2 * size**3 / took)
        size = min(8_192, size * 2) if took < seconds / 20 else size
    return best


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Bytes that tensors have held at most of a GPU's memory, by the name under which they are recorded."""
    return {"gpu_memory_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def describe() -> dict[str, str | int]:
    """Processor, cores this process may use, and memory in bytes."""
    return {
        "processor": processor_name(cpuinfo()),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }
