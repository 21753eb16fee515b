"""The process and the machine under it: allocator, threads, and the GEMM rate that MFU is measured against."""

from __future__ import annotations

import ctypes
import os
import platform
import time

import psutil
import torch

from tozan.comm.processor import cpuinfo
from tozan.ops import native

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


def prepare(threads: int | None, deterministic: bool, kernels: native.Choice = "auto") -> None:
    """Set this process up for training: allocator, thread count, determinism, kernels.

    Args:
        threads: threads for computing; 0 means every core this process may run on, None leaves them as they are.
        deterministic: refuse operations whose bits differ from run to run.
        kernels: compiled ones where they can be had, or `plain` PyTorch.
    """
    native.choose(kernels)
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    torch.use_deterministic_algorithms(deterministic)
    # Filling fresh memory with NaN is a debugging aid of that mode; it would double the memory traffic.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def choose_device(name: str) -> torch.device:
    """The device called `cpu`, `cuda` or `auto` (a GPU where there is one)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def measure_gemm_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """The best FLOP/s of a square matrix product, over about `seconds`.

    The size grows from 256 until one product takes a twentieth of the time, at most to 8,192. Operands are random:
    matrix units run faster on zeros.
    """
    generator = torch.Generator(device).manual_seed(0)
    size, best, end = 256, 0.0, time.perf_counter() + seconds
    a = b = torch.empty(0)
    while time.perf_counter() < end:
        if a.shape[0] != size:
            a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
            torch.nn.functional.linear(a, b)
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        best = max(best, 2 * size**3 / took)
        size = min(8_192, size * 2) if took < seconds / 20 else size
    return best


def describe() -> dict[str, str | int]:
    """Processor, cores this process may use, and memory in bytes."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    return cpuinfo().get("model name") or platform.processor() or platform.machine()
