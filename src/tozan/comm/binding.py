"""Which cores a rank computes on; torch-free.

Launchers bind in surprising ways (mpirun gives each of two ranks a single core, `srun --overcommit` all of them the
same one), so every rank looks at what it and its neighbours got: if the launcher gave them different cores, that is
kept; if they all have the same, tozan deals those out, by NUMA domain.

Cores are numbered as Linux does it, which counts hardware threads. Those of one core share its multipliers (and AMX's
tiles), and are often numbered far apart: they are kept together, and a rank computes on one thread for each core.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tozan.cpuinfo import parse
from tozan.layout import split


@dataclass(frozen=True)
class Binding:
    """The cores of one rank.

    Attributes:
        cores: their numbers, sorted.
        domains: the NUMA domains that they lie in.
        by: `the launcher` or `tozan`.
        shared: whether other ranks of the node have some of them, too.
    """

    cores: tuple[int, ...]
    domains: tuple[int, ...]
    by: str
    shared: bool

    def __str__(self) -> str:
        where = f"NUMA domain{'s' if len(self.domains) > 1 else ''} {', '.join(map(str, self.domains))}"
        cores = f"core{'s' if len(self.cores) > 1 else ''} {ranges(self.cores)}"
        shared = "; shared with other ranks: fewer cores than ranks" if self.shared else ""
        return f"{cores} ({where}), bound by {self.by}{shared}"


def decide(
    local_rank: int,
    affinities: Sequence[Sequence[int]],
    domain_of: Mapping[int, int],
    core_of: Mapping[int, int] | None = None,
) -> Binding:
    """The cores of a rank, from the cores that each rank of its node was given.

    Args:
        local_rank: this rank among them.
        affinities: the cores that the launcher left to each rank of the node.
        domain_of: NUMA domain of each core; cores that are missing count as domain 0.
        core_of: the core that each hardware thread is of; those that are missing are cores of their own.
    """
    whole = core_of or {}
    mine = sorted(affinities[local_rank])
    others = {core for rank, cores in enumerate(affinities) if rank != local_rank for core in cores}
    by, shared = "the launcher", bool(set(mine) & others)
    if len(affinities) > 1 and all(sorted(cores) == mine for cores in affinities):
        ordered = sorted(mine, key=lambda core: (domain_of.get(core, 0), whole.get(core, core), core))
        by, shared = "tozan", len(mine) < len(affinities)
        if shared:
            mine = [ordered[local_rank % len(ordered)]]
        else:
            dealt = list(dict.fromkeys(whole.get(core, core) for core in ordered))
            if len(dealt) < len(affinities):  # then ranks have to share cores
                dealt, whole = ordered, {}
            part = split(len(dealt), len(affinities), local_rank)
            mine = [core for core in mine if whole.get(core, core) in dealt[part.start : part.stop]]
    domains = tuple(sorted({domain_of.get(core, 0) for core in mine}))
    return Binding(tuple(mine), domains, by, shared)


def numa_domains(root: Path = Path("/sys/devices/system/node")) -> dict[int, int]:
    """NUMA domain of every core, as the kernel tells; empty where it does not."""
    found = {}
    for folder in root.glob("node[0-9]*"):
        for core in parse(folder.joinpath("cpulist").read_text()):
            found[core] = int(folder.name.removeprefix("node"))
    return found


def ranges(cores: Sequence[int]) -> str:
    """A kernel list of sorted numbers: 0, 1, 2, 3, 8 → `0-3,8`."""
    parts: list[list[int]] = []
    for core in cores:
        if parts and core == parts[-1][1] + 1:
            parts[-1][1] = core
        else:
            parts.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def bind(binding: Binding) -> None:
    """Keep this process, and all threads it starts from now on, on these cores."""
    os.sched_setaffinity(0, binding.cores)
