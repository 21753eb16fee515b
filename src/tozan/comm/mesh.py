"""Ranks arranged as a mesh: who talks to whom along which axis."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from tozan.comm.ledger import Ledger
from tozan.comm.monitor import Monitor
from tozan.layout import AXES, Layout

TP_AXES = AXES[3:]
"""The axes that `tp` joins."""


@dataclass(frozen=True, eq=False)
class Axis:
    """One line of the mesh through this rank: the ranks it talks to when something goes along the axis.

    An axis of size 1 has no group; every collective over it is the identity and leaves no entry in the ledger.

    Attributes:
        name: `dp`, `tp_row`, …; joined axes are `dp+cp`.
        size: ranks along it.
        index: this rank's place, 0 ≤ index < size.
        ranks: their global ranks, in order.
        group: PyTorch's process group, None for size 1.
        ledger: where its operations are written down.
        debug: compare operation, shape and dtype across ranks before every collective (see `collectives`).
        monitor: gives the one message when a peer is lost; None leaves exceptions as they come.
    """

    name: str
    size: int
    index: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = None
    ledger: Ledger = field(default_factory=Ledger)
    debug: bool = False
    monitor: Monitor | None = None

    @staticmethod
    def single(name: str = "none", rank: int = 0) -> Axis:
        """The axis of a rank that is alone."""
        return Axis(name, 1, 0, (rank,))


class Mesh:
    """All axes through this rank. Make one with `Mesh.create`.

    Attributes:
        layout: the sizes.
        rank: this process's global rank.
        ledger: shared by all axes.
        monitor: the heartbeat, if there is one.
    """

    def __init__(self, layout: Layout, rank: int, timeout_s: float, debug: bool, monitor: Monitor | None) -> None:
        self.layout, self.rank = layout, rank
        self.ledger = monitor.ledger if monitor else Ledger()
        self._timeout = timedelta(seconds=timeout_s)
        self._debug, self.monitor = debug, monitor
        self._axes: dict[tuple[str, ...], Axis] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    @staticmethod
    def create(
        layout: Layout,
        *,
        timeout_s: float = 120.0,
        debug: bool = False,
        monitor: Monitor | None = None,
        join: tuple[tuple[str, ...], ...] = (("dp", "cp"),),
    ) -> Mesh:
        """Make the groups of every axis; all ranks must call it alike.

        A gloo group costs two threads and a socket per peer, so groups are made once, here, axes with the same ranks
        share one, and axes of size 1 have none.

        Args:
            layout: sizes of the axes; their product is the world size. A world of 1 needs no torch.distributed.
            timeout_s: how long a collective may take before it is given up.
            debug: see `Axis.debug`.
            monitor: see `Axis.monitor`.
            join: joined axes to prepare, beside `tp`.

        Raises:
            ValueError: the layout has another number of ranks than the world.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        if layout.world_size != world:
            raise ValueError(f"{layout} has {layout.world_size} ranks, but the world has {world}")
        mesh = Mesh(layout, dist.get_rank() if world > 1 else 0, timeout_s, debug, monitor)
        for axis in AXES:
            mesh._make((axis,), axis)
        mesh._make(TP_AXES, "tp")
        for names in join:
            mesh.joined(*names)
        return mesh

    @property
    def world_size(self) -> int:
        """Ranks of the whole run."""
        return self.layout.world_size

    def __getitem__(self, name: str) -> Axis:
        """An axis of `layout.AXES`, or `tp` for its three together."""
        return self._axes[TP_AXES if name == "tp" else (name,)]

    @property
    def store(self) -> Store:
        """The job's store of keys and values, for what cannot be a collective; any thread may use it.

        Whoever does leaves keys of its own (no two savers' alike) and never waits inside of a call, which would keep
        other threads out.
        """
        return PrefixStore("mesh", dist.distributed_c10d._get_default_store())

    def joined(self, *names: str) -> Axis:
        """Several axes as one, in the order of their ranks; the first call for a combination is a collective.

        Raises:
            ValueError: no such axis.
        """
        key = tuple(axis for axis in AXES if any(axis in (TP_AXES if name == "tp" else (name,)) for name in names))
        if not key or any(name != "tp" and name not in AXES for name in names):
            raise ValueError(f"no mesh axes {names}; there are {', '.join(AXES)} and tp")
        return self._axes.get(key) or self._make(key, "+".join(key))

    @property
    def everyone(self) -> Axis:
        """All ranks as one axis; the first call is a collective."""
        return self._axes.get(AXES) or self._make(AXES, "world")

    def part(self, axis: Axis, size: int) -> tuple[Axis, Axis]:
        """Cut an axis into groups of `size` neighbours, for hybrid sharding: (inside a group, across groups).

        A collective. Rank `index` of the axis sits at `index % size` inside and at `index // size` across.

        Raises:
            ValueError: `size` does not divide the axis.
        """
        if size < 1 or axis.size % size:
            raise ValueError(f"axis {axis.name} of {axis.size} ranks cannot be cut into groups of {size}")
        if size == axis.size:
            return axis, Axis.single(f"{axis.name}_replicas", self.rank)
        # Ranks of other lines of the same axis make their groups at the same time, so everyone makes all of them.
        names = tuple(name for key, known in self._axes.items() if known is axis for name in key)
        lines = list(self.layout.groups(*names))
        inside = [line[i : i + size] for line in lines for i in range(0, axis.size, size)]
        across = [line[i::size] for line in lines for i in range(size)]
        return self._line(f"{axis.name}_shards", inside), self._line(f"{axis.name}_replicas", across)

    def _make(self, names: tuple[str, ...], label: str) -> Axis:
        axis = self._line(label, list(self.layout.groups(*names)))
        self._axes[names] = axis
        return axis

    def _line(self, label: str, groups: list[tuple[int, ...]]) -> Axis:
        """Make all groups (a collective) and return the axis of the one that this rank is in."""
        mine = next(ranks for ranks in groups if self.rank in ranks)
        if len(mine) > 1:
            for ranks in groups:
                if ranks not in self._groups:
                    self._groups[ranks] = dist.new_group(list(ranks), timeout=self._timeout)
        group = self._groups.get(mine)
        return Axis(label, len(mine), mine.index(self.rank), mine, group, self.ledger, self._debug, self.monitor)
