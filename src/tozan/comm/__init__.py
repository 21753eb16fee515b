"""Who talks: launching, the mesh of ranks, collectives over its axes, the ledger of what was said."""

from tozan.comm.collectives import CommunicationError, Handle
from tozan.comm.ledger import Entry, Ledger
from tozan.comm.mesh import Axis, Mesh
from tozan.comm.monitor import Monitor

__all__ = ["Axis", "CommunicationError", "Entry", "Handle", "Ledger", "Mesh", "Monitor"]
