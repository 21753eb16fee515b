"""How Linux describes the processors of a machine, and which of them are one core; torch-free.

Its processors are hardware threads. Those of one core share its multipliers, so what computes counts cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def processors(root: Path = Path("/")) -> list[dict[str, str]]:
    """The entries of every processor, as Linux counts (hardware threads); none where the system keeps no such file.

    Args:
        root: where /proc is found.
    """
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [_entries(part) for part in text.strip().split("\n\n")]


def cpuinfo(root: Path = Path("/")) -> dict[str, str]:
    """The first processor's entries; empty where there are none."""
    return next(iter(processors(root)), {})


def flags(cpu: Mapping[str, str]) -> set[str]:
    """Units and instructions that a processor has, by the names of its entry `flags` (x86) or `Features` (Arm)."""
    return set(cpu.get("flags", cpu.get("Features", "")).split())


def hardware_threads() -> int:
    """Processors that this process may use, as Linux counts; all of the machine's where the system cannot say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use. Hardware threads of one core share its multipliers, so they count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return count_cores(os.sched_getaffinity(0), core_of(root / "sys/devices/system/cpu"))


def core_of(root: Path = Path("/sys/devices/system/cpu")) -> dict[int, int]:
    """The core of every hardware thread, by its first thread's number; empty where the kernel does not tell."""
    found = {}
    for path in root.glob("cpu[0-9]*/topology/thread_siblings_list"):
        siblings = parse(path.read_text())
        found.update(dict.fromkeys(siblings, min(siblings)))
    return found


def count_cores(threads: Iterable[int], core_of: Mapping[int, int]) -> int:
    """How many cores some hardware threads are of."""
    return len({core_of.get(thread, thread) for thread in threads})


def parse(text: str) -> list[int]:
    """Numbers of a kernel list: `0-3,8` → 0, 1, 2, 3, 8."""
    cores: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return cores


def _entries(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
