"""Checkpoints: safetensors and JSON, staged, checksummed, synced, renamed, and free of any layout."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tozan.checkpoint.reader import fill, load, newest, resolve, stream, verify
    from tozan.checkpoint.saver import Saver
    from tozan.checkpoint.state import Box, Pieces, State, state_hash
    from tozan.checkpoint.writer import save

__all__ = [
    "Box",
    "Pieces",
    "Saver",
    "State",
    "fill",
    "load",
    "newest",
    "resolve",
    "save",
    "state_hash",
    "stream",
    "verify",
]

_HOMES = {
    **dict.fromkeys(("fill", "load", "newest", "resolve", "stream", "verify"), "reader"),
    "save": "writer",
    "Saver": "saver",
    **dict.fromkeys(("Box", "Pieces", "State", "state_hash"), "state"),
}


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
