"""Kernels on AMX tiles on any processor with AVX-512: the machine code itself, its AMX instructions in software."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tozan.ops import native, tiles

KINDS = ("configured", "released", "zeroed", "loaded", "stored", "multiplied")
HERE = tiles._units() >= tiles.UNITS
"""Whether this processor has AMX itself; then nothing is trapped."""


@functools.cache
def library(task: tiles.Task) -> ctypes.CDLL:
    """Products or attention on tiles, compiled for this processor as if it had AMX."""
    if native._products() is None:
        pytest.skip("kernels on tiles need AVX-512 with bf16, too")
    found, why = native.open_library(tiles.SOURCES[task], ["-mamx-tile", "-mamx-bf16"])
    assert found is not None, why
    if HERE:
        assert found.tiles_permitted()
    return found


@functools.cache
def _trap() -> ctypes.CDLL:
    found, why = native.open_library(Path(__file__).with_suffix(".cpp"), ["-ffp-contract=off"])
    assert found is not None, why
    found.trap_remove.restype = ctypes.c_char_p
    return found


@contextmanager
def trapped() -> Iterator[dict[str, int]]:
    """Carries out AMX instructions meanwhile, and says at the end how many of each kind; they must be without fault."""
    counts: dict[str, int] = {}
    numbers = (ctypes.c_long * len(KINDS))()
    _trap().trap_install()
    try:
        yield counts
    finally:
        trouble = _trap().trap_remove(numbers).decode()
        counts.update(zip(KINDS, numbers, strict=True))
    assert trouble == ""
    assert counts["configured"] == counts["released"]
