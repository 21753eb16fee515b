"""Which rank this process is, read from what the launcher left in the environment; torch-free.

Understood: torchrun, OpenMPI's and Fujitsu's mpirun/mpiexec (Fugaku under PJM), Slurm's srun, or nothing (one process).
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tozan.amounts import many
from tozan.errors import Problem, UserError

VARIABLE = "TOZAN_SECRET"
"""Environment variable with the job's secret, the same for all ranks (see `rendezvous`)."""


EVERYWHERE = "0.0.0.0"
"""Stands for all addresses of a machine."""


@dataclass(frozen=True)
class Place:
    """Where a process stands in its job.

    Attributes:
        rank: 0 ≤ rank < world_size.
        world_size: processes in the job.
        local_rank: number among the processes of this node.
        local_size: processes of this node.
        master: address of the node that holds rank 0.
        port: where rank 0 listens.
        launcher: who started the process: `torchrun`, `mpirun`, `slurm`, `pjm`, `agent` (tozan's own) or `none`.
        hosted: the launcher itself answers at `master:port` (torchrun's agent does, and tozan's).
        generation: how often tozan's agent has started the ranks; 0 without it.
        restarts: the launcher starts all ranks again when one is lost.
        warm: the same ranks have taken steps before and continue from memory: none starts much more slowly than others.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master: str = "127.0.0.1"
    port: int = 0
    launcher: str = "none"
    hosted: bool = False
    generation: int = 0
    restarts: bool = False
    warm: bool = False


def find(environment: Mapping[str, str] | None = None) -> Place:
    """Read the variables of tozan's agent, or of the launcher.

    Args:
        environment: default: this process's.

    Raises:
        UserError: variables that contradict each other, or no way to find the node of rank 0.
    """
    e = os.environ if environment is None else environment
    if "TOZAN_AGENT" in e:
        found = _place(e, "agent", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), True)
        told = json.loads(e["TOZAN_AGENT"])
        return replace(found, generation=int(told["generation"]), restarts=True, warm=bool(told["warm"]))
    if "RANK" in e and "WORLD_SIZE" in e:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in e else "none"
        hosted = e.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        found = _place(e, launcher, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), hosted)
        return replace(found, restarts=launcher == "torchrun" and e.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0")
    if "PJM_JOBID" in e and "PLE_RANK_ON_NODE" in e:
        return _fugaku(e)
    if "OMPI_COMM_WORLD_RANK" in e:
        names = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
        return _place(e, "mpirun", names, False)
    if "SLURM_PROCID" in e and "SLURM_STEP_ID" in e:
        counts = expand_counts(e.get("SLURM_STEP_TASKS_PER_NODE", e["SLURM_NTASKS"]))
        local = {"SLURM_LOCAL_SIZE": str(counts[int(e.get("SLURM_NODEID", "0"))])}
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_LOCAL_SIZE")
        return _place({**e, **local}, "slurm", names, False)
    return Place()


def check(world_size: int, place: Place, wanted_by: str = "layout") -> None:
    """Refuse a layout that needs another number of ranks than were started.

    Raises:
        UserError: asked for 8, got 4.
    """
    if world_size == place.world_size:
        return
    got = f"{many(place.world_size, 'rank')} started by {place.launcher}"
    if place.launcher == "none":
        got = f"{many(place.world_size, 'process')}, started without a launcher"
    raise UserError(
        Problem(
            wanted_by,
            f"asks for {many(world_size, 'rank')}, but there {'are' if place.world_size > 1 else 'is'} {got}",
            f"start {many(world_size, 'rank')} (tozan launch writes the command), or choose a layout of "
            f"{place.world_size}",
        )
    )


def address_towards(address: str) -> str:
    """This host's own address on the route to `address`; a loopback address if that is this host itself."""
    family, *_, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # a datagram socket: chooses the route, sends nothing
        return str(probe.getsockname()[0])


def interface_to(address: str) -> str | None:
    """The network interface that packets to `address` leave by; None if it cannot be told.

    gloo otherwise takes the address that the host's own name resolves to, which on Debian is 127.0.1.1 and reaches
    no other host.
    """
    import psutil

    mine = address_towards(address)
    if is_loopback(mine):
        return "lo"
    for name, addresses in psutil.net_if_addrs().items():
        if any(candidate.address.partition("%")[0] == mine for candidate in addresses):
            return str(name)
    return None


def outward(host: str) -> str:
    """The address by which this machine is to use the name that other machines have for `host`.

    Debian's /etc/hosts calls a machine's own name 127.0.1.1, where nobody else reaches it. Then it is this machine's
    other address if it has just one; if it has several, it cannot be told which of them the others see. Who says
    `localhost`, or gives a loopback address as such, means it.

    Args:
        host: a name or an address.

    Returns:
        That one address, or `host` as it is.
    """
    if not called_loopback(host):
        return host
    own = addresses()
    return own.pop() if len(own) == 1 else host


def called_loopback(host: str) -> bool:
    """Whether a name, not an address, means a loopback address on this machine."""
    try:
        family, *_, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    except OSError:
        return False  # whoever connects says what is wrong
    meant = host in ("localhost", str(target[0]))
    return family == socket.AF_INET and not meant and is_loopback(str(target[0]))


def addresses() -> set[str]:
    """This machine's IPv4 addresses that others may reach."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family == socket.AF_INET and not is_loopback(entry.address)
    }


def listen(host: str, port: int = 0, *, one_machine: bool) -> socket.socket:
    """Listen on one address of this machine.

    Args:
        host: the name or address by which others know this machine.
        port: where to listen; 0 takes any free port.
        one_machine: nobody comes from elsewhere.

    Returns:
        The socket. It is bound to `host`'s address, but to every interface's where others look for a name that is a
        loopback address here: which of this machine's addresses they see is not known (see `outward`) until the first
        of them has come.

    Raises:
        OSError: the address is in use, or none of this machine's.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    where = str(address[0])
    if not one_machine and called_loopback(host):
        family, where = socket.AF_INET, EVERYWHERE
    return socket.create_server((where, port), family=family, backlog=4096)


def is_loopback(address: str) -> bool:
    """Whether an address reaches this host only."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def expand_hosts(text: str) -> list[str]:
    """Host names of a Slurm list: `n[01-03,7],login` → n01, n02, n03, n7, login."""
    hosts = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        match = re.fullmatch(r"(.*?)\[([^\]]*)\](.*)", item)
        if not match:
            hosts.append(item)
            continue
        before, inside, after = match.groups()
        for part in inside.split(","):
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                hosts += expand_hosts(f"{before}{number:0{len(first)}d}{after}")
    return hosts


def expand_counts(text: str) -> list[int]:
    """Numbers of a Slurm list: `2(x3),1` → 2, 2, 2, 1."""
    counts = []
    for item in text.split(","):
        count, _, repeat = item.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts


def _place(e: Mapping[str, str], launcher: str, names: tuple[str, ...], hosted: bool) -> Place:
    rank, world = int(e[names[0]]), int(e[names[1]])
    local_rank, local_size = int(e.get(names[2], rank)), int(e.get(names[3], world))
    if not 0 <= rank < world or not 0 <= local_rank < local_size:
        values = ", ".join(f"{name}={e.get(name, '(not set)')}" for name in names)
        raise UserError(Problem(f"environment ({launcher})", f"{values} contradict each other", "unset all of them"))
    master = e.get("MASTER_ADDR")
    if master is None and "SLURM_STEP_NODELIST" in e:
        master = expand_hosts(e["SLURM_STEP_NODELIST"])[0]
    if master is None and local_size == world:
        master = "127.0.0.1"
    if master is None:
        raise UserError(
            Problem(
                f"environment ({launcher})",
                f"{world} ranks on several nodes, but MASTER_ADDR is not set: nobody knows where rank 0 is",
                "set MASTER_ADDR to the first node's name, as the scripts of `tozan launch` do",
            )
        )
    port = int(e["MASTER_PORT"]) if "MASTER_PORT" in e else _port(e)
    return Place(rank, world, local_rank, local_size, master, port, launcher, hosted)


def _fugaku(e: Mapping[str, str]) -> Place:
    """Fujitsu's mpiexec numbers processes by PMIx and within a node by PLE; PJM knows how many there are."""
    rank = e.get("OMPI_COMM_WORLD_RANK", e.get("PMIX_RANK", ""))
    world, nodes = int(e["PJM_MPI_PROC"]), int(e["PJM_NODE"])
    local = {"PMIX_RANK": rank, "PJM_LOCAL_SIZE": e.get("PJM_PROC_BY_NODE", str(-(-world // nodes)))}
    names = ("PMIX_RANK", "PJM_MPI_PROC", "PLE_RANK_ON_NODE", "PJM_LOCAL_SIZE")
    return _place({**e, **local}, "pjm", names, False)


def _port(e: Mapping[str, str]) -> int:
    """A port that the ranks of a job agree on and that differs between jobs."""
    job = next(
        (e[name] for name in ("PJM_JOBID", "SLURM_JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid") if name in e),
        "",
    )
    return 20_000 + zlib.crc32(f"{job} {e.get('SLURM_STEP_ID', '')}".encode()) % 12_000
