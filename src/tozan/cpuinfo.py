"""/proc/cpuinfo: how Linux describes the processors of a machine; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
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


def _entries(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
