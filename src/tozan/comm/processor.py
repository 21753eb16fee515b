"""What a processor could do at most: FLOPs of a core in a cycle, by precision, times cores, times clock; torch-free.

FLOPs per cycle follow from the processor's make (fused multiply-adds started in a cycle × lanes × 2). They are known
for the makes below, from their makers' manuals; for any other the peak stays unknown, with the reason.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tozan.amounts import many
from tozan.cpuinfo import cores as cores  # rooms above find both here, too
from tozan.cpuinfo import cpuinfo as cpuinfo
from tozan.cpuinfo import flags, parse

ZEN = {  # (family, first model, last model): name, 512-bit or 256-bit multiply-adds a cycle, each as bits in all
    (23, 0x00, 0x2F): ("Zen", 256),
    (23, 0x30, 0xFF): ("Zen 2", 512),
    (25, 0x00, 0x0F): ("Zen 3", 512),
    (25, 0x10, 0x1F): ("Zen 4", 512),
    (25, 0x20, 0x5F): ("Zen 3", 512),
    (25, 0x60, 0xAF): ("Zen 4", 512),
    (26, 0x00, 0x1F): ("Zen 5", 1024),
    (26, 0x40, 0x4F): ("Zen 5", 1024),
}
"""AMD's cores and the bits of fused multiply-adds that one starts in a cycle; family 26 has half as many in laptops."""
XEON = {
    85: "Skylake or Cascade Lake",
    106: "Ice Lake",
    108: "Ice Lake",
    143: "Sapphire Rapids",
    207: "Emerald Rapids",
    173: "Granite Rapids",
    174: "Granite Rapids",
}
"""Intel's server cores with two pipes of 512 bits, by model of family 6."""
ONE_PIPE = ("Bronze", "Silver 41", "Silver 42", "Gold 51", "Gold 52")
"""Of model 85, those of which some have one pipe of 512 bits only."""
CORE = {60: "Haswell", 63: "Haswell", 69: "Haswell", 70: "Haswell", 61: "Broadwell", 71: "Broadwell", 79: "Broadwell",
        86: "Broadwell", 78: "Skylake", 94: "Skylake", 142: "Kaby Lake", 158: "Kaby Lake", 165: "Comet Lake",
        166: "Comet Lake"}  # fmt: skip
"""Intel's cores with two pipes of 256 bits."""
ARM = {
    ("0x46", "0x001"): ("A64FX", 1024, 1),
    ("0x41", "0xd0c"): ("Neoverse N1", 256, None),
    ("0x41", "0xd49"): ("Neoverse N2", 256, None),
    ("0x41", "0xd40"): ("Neoverse V1", 512, None),
    ("0x41", "0xd4f"): ("Neoverse V2", 512, 4),
}
"""Arm's cores by implementer and part: name, bits of multiply-adds in a cycle, bf16 over fp32 (None: not known)."""
AMX_FLOPS = 1024
"""Of a tile product: 16 × 16 × 32 multiply-adds in 16 cycles."""
CHAIN = 64
"""Dependent additions in one turn of the loop that measures the clock."""


@dataclass(frozen=True)
class Core:
    """What one core starts in a cycle.

    Attributes:
        name: its make.
        flops: FLOPs in a cycle by precision; None where it is not known.
    """

    name: str
    flops: Mapping[str, int | None]


@dataclass(frozen=True)
class Nominal:
    """A processor's peak.

    Attributes:
        flops: FLOP/s; None if it cannot be known.
        how: what it is the product of, or why it is not known.
    """

    flops: float | None
    how: str


def core(cpu: Mapping[str, str]) -> Core | None:
    """The core that /proc/cpuinfo describes; None if its FLOPs per cycle are not known here.

    Precisions without a unit of their own are computed in fp32, at its rate.
    """
    if "CPU part" in cpu:
        found = ARM.get((cpu.get("CPU implementer", ""), cpu["CPU part"]))
        if found is None:
            return None
        name, bits, times = found
        fp32 = bits // 16
        return Core(name, {"fp64": fp32 // 2, "fp32": fp32, "fp16": 2 * fp32, "bf16": times and times * fp32})
    try:
        family, model = int(cpu["cpu family"]), int(cpu["model"])
    except (KeyError, ValueError):
        return None
    make = _intel if cpu.get("vendor_id") == "GenuineIntel" else _amd
    return make(family, model, flags(cpu), cpu.get("model name", ""))


def _amd(family: int, model: int, flags: set[str], _name: str) -> Core | None:
    for (its, first, last), (name, bits) in ZEN.items():
        if family == its and first <= model <= last:
            fp32 = bits // 16
            bf16 = 2 * fp32 if "avx512_bf16" in flags else fp32
            return Core(name, {"fp64": fp32 // 2, "fp32": fp32, "fp16": fp32, "bf16": bf16})
    return None


def _intel(family: int, model: int, flags: set[str], name: str) -> Core | None:
    if family != 6 or "fma" not in flags:
        return None
    if model in CORE:
        return Core(CORE[model], {"fp64": 16, "fp32": 32, "fp16": 32, "bf16": 32})
    if model not in XEON or "avx512f" not in flags or (model == 85 and any(word in name for word in ONE_PIPE)):
        return None
    # AVX-512's own bf16 products without AMX: how many pipes have them differs and is not documented.
    bf16 = AMX_FLOPS if "amx_bf16" in flags else None if "avx512_bf16" in flags else 64
    fp16 = AMX_FLOPS if "amx_fp16" in flags else 128 if "avx512_fp16" in flags else 64
    return Core(XEON[model], {"fp64": 32, "fp32": 64, "fp16": fp16, "bf16": bf16})


def name(cpu: Mapping[str, str]) -> str:
    """What the processor that /proc/cpuinfo describes is called; Arm's kernels give numbers in place of a name."""
    arm = ARM.get((cpu.get("CPU implementer", ""), cpu.get("CPU part", "")))
    part = f"{platform.machine()}, part {cpu['CPU part']}" if "CPU part" in cpu else ""
    return (arm[0] if arm else cpu.get("model name")) or part or platform.processor() or platform.machine()


def peak_memory() -> int:
    """Bytes that this process has held at most; macOS counts in bytes, others in KiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def largest_resident_set(root: Path = Path("/")) -> int:
    """Bytes that this process itself has held at most, as Linux keeps it (VmHWM).

    What `peak_memory` asks for costs less to read, but may begin with the memory of the process that started this one.
    """
    status = (root / "proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def nominal(precision: str, threads: int, root: Path = Path("/")) -> Nominal:
    """The peak of matrix products: physical cores in use × FLOPs per cycle × clock.

    Args:
        precision: `fp64`, `fp32`, `bf16`, `fp16`.
        threads: of this process; hardware threads of one core count once.
        root: where /proc and /sys are found.
    """
    cpu = cpuinfo(root)
    found = core(cpu)
    if found is None:
        return Nominal(None, f"not known how many FLOPs a core of this make ({name(cpu)}) does in a cycle")
    each = found.flops.get(precision)
    if each is None:
        return Nominal(None, f"not known how many {precision} FLOPs a {found.name} core does in a cycle")
    hertz, how = clock(root)
    if hertz is None:
        return Nominal(None, f"the clock is not known: {how}")
    count = min(threads, cores(root))
    return Nominal(
        count * each * hertz,
        f"{many(count, 'core')} × {each} FLOP a cycle ({found.name}) × {hertz / 1e9:.2f} GHz ({how})",
    )


GPUS = {
    "A100": {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12, "fp64": 19.5e12},
    "H100 PCIe": {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12, "fp64": 51e12},
    "H100": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12, "fp64": 67e12},
    "H200": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12, "fp64": 67e12},
    "V100": {"fp16": 125e12, "fp32": 15.7e12, "fp64": 7.8e12},
}
"""FLOP/s of dense products by what a GPU's name contains, from NVIDIA's datasheets; the first that fits counts."""


def nominal_gpu(precision: str, device: str) -> Nominal:
    """The peak of matrix products of a GPU.

    Args:
        precision: `fp64`, `fp32`, `bf16`, `fp16`.
        device: what the GPU calls itself, such as `NVIDIA H100 80GB HBM3`.
    """
    found = next((name for name in GPUS if name in device), None)
    if found is None or precision not in GPUS[found]:
        return Nominal(None, f"not known how many {precision} FLOP/s a {device} does")
    return Nominal(GPUS[found][precision], f"{found}, from its datasheet")


def siblings(root: Path = Path("/")) -> int:
    """Hardware threads of a physical core."""
    try:
        text = (root / "sys/devices/system/cpu/cpu0/topology/thread_siblings_list").read_text(encoding="utf-8")
    except OSError:
        return 1
    return max(1, len(parse(text.strip())))


def clock(root: Path = Path("/")) -> tuple[float | None, str]:
    """Cycles per second of a core: measured where that is possible, else what the kernel says it can reach.

    `cpu MHz` of a virtual machine is that of its time stamps, not of its cores, and is not used.

    Returns:
        Hz and how they are known, or None and why not.
    """
    found = measured_clock() if root == Path("/") else None
    if found:
        return found, "measured: a chain of additions, one a cycle"
    for name in ("cpuinfo_max_freq", "scaling_max_freq"):
        try:
            kilohertz = int((root / "sys/devices/system/cpu/cpu0/cpufreq" / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return 1e3 * kilohertz, "the kernel's highest"
    return None, "the kernel does not say it, and this machine runs no code of ours to measure it"


@cache
def measured_clock(turns: int = 4_000, bursts: int = 200) -> float | None:
    """Cycles per second of one core while it works, by 64 additions that wait for each other and take a cycle each.

    Register to register: newer cores do additions of constants ahead of time. The best of many bursts of 70
    microseconds counts, so that other processes on the core do no harm. About 15 ms; None on other than x86-64 with
    Linux or macOS, and where memory may not be executed.
    """
    if platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        return None
    chain = b"\x48\x01\xf8" * CHAIN + b"\x48\xff\xcf"  # add rax, rdi …; dec rdi
    back = (-len(chain) - 6).to_bytes(4, "little", signed=True)
    code = b"\x48\x31\xc0" + chain + b"\x0f\x85" + back + b"\xc3"  # xor rax, rax; …; jnz; ret
    try:
        page = mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    page.write(code)
    held = ctypes.c_char.from_buffer(page)
    run = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64)(ctypes.addressof(held))
    best = 0.0
    for _ in range(bursts):
        begin = time.perf_counter()
        run(turns)
        best = max(best, turns * CHAIN / (time.perf_counter() - begin))
    del run, held
    page.close()
    return best
