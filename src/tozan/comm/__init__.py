"""Who talks: launching, the mesh of ranks, collectives over its axes, the ledger of what was said.

Importing this package does not import torch (`jobs`, `place` and `binding` do without); asking it for a mesh does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tozan.comm.collectives import CommunicationError, Handle
    from tozan.comm.ledger import Entry, Ledger
    from tozan.comm.mesh import Axis, Mesh
    from tozan.comm.monitor import Monitor

__all__ = ["Axis", "CommunicationError", "Entry", "Handle", "Ledger", "Mesh", "Monitor"]

_LAZY = {
    "Axis": "mesh",
    "CommunicationError": "collectives",
    "Entry": "ledger",
    "Handle": "collectives",
    "Ledger": "ledger",
    "Mesh": "mesh",
    "Monitor": "monitor",
}


def __getattr__(name: str) -> Any:
    """Imports a part only when it is asked for (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
