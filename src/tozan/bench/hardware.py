"""What the kernel says about this machine and this process, read from /proc and /sys; torch-free.

Every path is looked up under a root, so that tests can lay out a machine of their own.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tozan.comm.binding import numa_domains
from tozan.comm.processor import name as processor_name
from tozan.comm.processor import siblings
from tozan.cpuinfo import cores, cpuinfo, flags, hardware_threads, parse

UNITS = {
    "amx_bf16": "AMX bf16",
    "amx_int8": "AMX int8",
    "amx_fp16": "AMX fp16",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "avx512_fp16": "AVX-512 fp16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx2": "AVX2",
    "sve": "SVE",
    "sve2": "SVE2",
    "bf16": "Arm bf16",
    "svebf16": "SVE bf16",
    "i8mm": "Arm int8",
    "asimd": "Neon",
}
"""Flags of /proc/cpuinfo that matter to matrix products, with the names that people use."""

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc", "snmalloc")
THREAD_VARIABLES = (
    *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_BLOCKTIME"),
    *("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
)
ALLOCATOR_VARIABLES = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "MALLOC_CONF")
NETWORK_VARIABLES = ("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT", "FI_PROVIDER", "UCX_TLS")


@dataclass(frozen=True)
class Interface:
    """A network interface.

    Attributes:
        name: the kernel's.
        up: whether it carries traffic.
        addresses: IPv4 and IPv6.
        bits_per_second: of the link; None where the kernel does not say (virtual ones, loopback).
        mtu: largest packet.
    """

    name: str
    up: bool
    addresses: tuple[str, ...]
    bits_per_second: float | None
    mtu: int


@dataclass(frozen=True)
class Hardware:
    """The machine as this process sees it.

    Attributes:
        processor: model name.
        online: hardware threads of the machine.
        affinity: those that this process may run on.
        cores: cores that those are of: what computing counts.
        threads_per_core: hardware threads of a physical core.
        quota: cores' worth of time that the container may use; None without a limit.
        units: matrix and vector units, by the names of `UNITS`.
        domains: memory bytes of each NUMA domain; cores in `domain_cores`.
        domain_cores: cores of each NUMA domain.
        distance: how much farther the farthest domain's memory is than a domain's own, as the firmware says.
        numa_balancing: whether the kernel moves pages between domains by itself.
        memory: bytes in all.
        available: bytes that can be had now.
        memory_limit: of the container; None without one.
        swap_used: bytes.
        huge_pages: the kernel's setting for transparent huge pages: `always`, `madvise`, `never`.
        explicit_huge_pages: reserved ones.
        shared_memory: bytes of /dev/shm.
        clock: clock source.
        governor: of the clock speed; empty if the kernel does not say.
        load: processes that want to run, averaged over a minute.
        interfaces: network interfaces.
        limits: soft limits of the process by name; None is unlimited.
        preloaded: allocators among the libraries that are loaded.
        variables: environment variables that matter, those that are set.
        own_name_is_loopback: whether /etc/hosts gives this host's name an address that no other host reaches.
        hypervisor: whether this is a virtual machine.
    """

    processor: str
    online: int
    affinity: int
    cores: int
    threads_per_core: int
    quota: float | None
    units: tuple[str, ...]
    domains: Mapping[int, int]
    domain_cores: Mapping[int, tuple[int, ...]]
    distance: float
    numa_balancing: bool
    memory: int
    available: int
    memory_limit: int | None
    swap_used: int
    huge_pages: str
    explicit_huge_pages: int
    shared_memory: int
    clock: str
    governor: str
    load: float
    interfaces: tuple[Interface, ...]
    limits: Mapping[str, int | None]
    preloaded: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    own_name_is_loopback: bool = False
    hypervisor: bool = False

    @property
    def machine_cores(self) -> int:
        """Cores of the machine, whoever may use them."""
        return max(1, self.online // self.threads_per_core)


def read(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> Hardware:
    """Look at the machine.

    Args:
        root: where /proc and /sys are found.
        environment: default: this process's.
    """
    e = os.environ if environment is None else environment
    cpu, memory = cpuinfo(root), _meminfo(root)
    units = flags(cpu)
    domain_of = numa_domains(root / "sys/devices/system/node")
    domain_cores = {
        domain: tuple(c for c, d in domain_of.items() if d == domain) for domain in sorted(set(domain_of.values()))
    }
    online = len(parse(_text(root / "sys/devices/system/cpu/online"))) or os.cpu_count() or 1
    swap = memory.get("SwapTotal", 0) - memory.get("SwapFree", 0)
    return Hardware(
        processor=processor_name(cpu),
        online=online,
        affinity=hardware_threads(),
        cores=cores(root),
        threads_per_core=siblings(root),
        quota=_quota(root),
        units=tuple(name for flag, name in UNITS.items() if flag in units),
        domains={domain: _domain_memory(root, domain) for domain in domain_cores},
        domain_cores=domain_cores,
        distance=_distance(root),
        numa_balancing=_text(root / "proc/sys/kernel/numa_balancing") not in ("", "0"),
        memory=memory.get("MemTotal", 0),
        available=memory.get("MemAvailable", 0),
        memory_limit=_memory_limit(root),
        swap_used=swap,
        huge_pages=_chosen(_text(root / "sys/kernel/mm/transparent_hugepage/enabled")),
        explicit_huge_pages=memory.get("HugePages_Total", 0),
        shared_memory=_size_of(root / "dev/shm"),
        clock=_text(root / "sys/devices/system/clocksource/clocksource0/current_clocksource"),
        governor=_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        load=float((_text(root / "proc/loadavg") or "0").split()[0]),
        interfaces=_interfaces(root),
        limits=_limits(),
        preloaded=tuple(name for name in ALLOCATORS if name in _text(root / "proc/self/maps")),
        variables={n: e[n] for n in (*THREAD_VARIABLES, *ALLOCATOR_VARIABLES, *NETWORK_VARIABLES) if n in e},
        own_name_is_loopback=_own_name_is_loopback(root),
        hypervisor="hypervisor" in units,
    )


def _text(path: Path) -> str:
    """A small file of the kernel; empty where there is none or it refuses."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes (or counts) by name."""
    found = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        number, *unit = value.split() or ["0"]
        found[name] = int(number) * (1024 if unit else 1)
    return found


def _domain_memory(root: Path, domain: int) -> int:
    for line in _text(root / f"sys/devices/system/node/node{domain}/meminfo").splitlines():
        if "MemTotal:" in line:
            return int(line.split()[-2]) * 1024
    return 0


def _distance(root: Path) -> float:
    """The ACPI table's largest distance over the smallest, seen from the first domain."""
    distances = [int(word) for word in _text(root / "sys/devices/system/node/node0/distance").split()]
    return max(distances) / min(distances) if distances else 1.0


def _own_name_is_loopback(root: Path) -> bool:
    name = _text(root / "proc/sys/kernel/hostname")
    lines = (line.partition("#")[0].split() for line in _text(root / "etc/hosts").splitlines())
    mine = [words[0] for words in lines if name in words[1:]]
    return bool(mine) and mine[0].startswith("127.")


def _quota(root: Path) -> float | None:
    """Cores' worth of processor time, from either generation of control groups."""
    text = _text(root / "sys/fs/cgroup/cpu.max")
    if not text:
        quota, period = (_text(root / f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
        text = f"{quota} {period}" if quota and period else "max 1"
    limit, _, period = text.partition(" ")
    return None if limit in ("max", "-1") else int(limit) / int(period or 100_000)


def _memory_limit(root: Path) -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _text(root / "sys/fs/cgroup" / name)
        if text.isdecimal() and int(text) < 1 << 60:  # the first generation writes "no limit" as a huge number
            return int(text)
    return None


def _chosen(text: str) -> str:
    """The word in brackets: `always [madvise] never`."""
    return text.partition("[")[2].partition("]")[0]


def _size_of(folder: Path) -> int:
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_frsize * status.f_blocks


def _interfaces(root: Path) -> tuple[Interface, ...]:
    import psutil

    addresses = psutil.net_if_addrs() if root == Path("/") else {}
    found = []
    for folder in sorted((root / "sys/class/net").glob("*")):
        speed = _text(folder / "speed")
        known = speed.isdecimal() and int(speed) > 0
        mine = tuple(a.address.partition("%")[0] for a in addresses.get(folder.name, ()) if a.family in _FAMILIES)
        flags = int(_text(folder / "flags") or "0", 16)
        found.append(
            Interface(
                folder.name,
                bool(flags & 1) and _text(folder / "operstate") in ("up", "unknown"),
                mine,
                int(speed) * 1e6 if known else None,
                int(_text(folder / "mtu") or "0"),
            )
        )
    return tuple(found)


def _limits() -> dict[str, int | None]:
    names = {"nofile": "RLIMIT_NOFILE", "memlock": "RLIMIT_MEMLOCK", "nproc": "RLIMIT_NPROC", "stack": "RLIMIT_STACK"}
    found: dict[str, int | None] = {}
    for name, constant in names.items():
        soft, _ = resource.getrlimit(getattr(resource, constant))
        found[name] = None if soft == resource.RLIM_INFINITY else soft
    return found
