"""What is wrong with a machine or the way a process was started: what it costs, and the line that mends it; torch-free.

Costs are measured on this machine in the same minute where that is possible; where not, they say whose number they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from tozan.amounts import many, percent, scaled
from tozan.bench.hardware import Hardware

HERE = "measured here"
GRADIENTS = 4 * 124_475_904
"""Bytes of GPT-2 124M's gradients: what a slow network is priced with."""


@dataclass(frozen=True)
class Trouble:
    """One problem.

    Attributes:
        name: a word for it.
        what: how it is.
        cost: what that costs, with a number.
        source: whose number it is.
        fix: the line to type, or what to ask for.
        factor: how many times slower something gets; None if the cost is no such ratio.
    """

    name: str
    what: str
    cost: str
    source: str
    fix: str
    factor: float | None = None


@dataclass(frozen=True)
class Measured:
    """What the rules need to know.

    Attributes:
        gemm: FLOP/s by precision and threads.
        threads: that PyTorch started with.
        all_cores: fp32 FLOP/s on all cores of the machine, where this process is kept from some; None if not tried.
        kept: whether the C library accepted to keep freed memory.
        fresh: seconds to fill a new buffer of 64 MiB, as the process was started.
        reused: seconds when freed memory is kept.
        small_pages: seconds to touch new memory of 64 MiB for the first time, in pages of 4 KiB.
        large_pages: the same in huge pages.
        clock: seconds to read the clock.
        launcher_error: why the launcher's variables contradict each other; empty if they do not.
    """

    gemm: Mapping[tuple[str, int], float]
    threads: int
    all_cores: float | None = None
    kept: bool = True
    fresh: float = 0.0
    reused: float = 0.0
    small_pages: float = 0.0
    large_pages: float = 0.0
    clock: float = 0.0
    launcher_error: str = ""
    launcher: str = field(default="none")


def find(machine: Hardware, measured: Measured) -> list[Trouble]:
    """All problems, the most expensive first; those whose cost is no factor come last."""
    found = [trouble for rule in RULES for trouble in rule(machine, measured)]
    return sorted(found, key=lambda trouble: -(trouble.factor or 0.0))


def _threads(machine: Hardware, measured: Measured) -> Iterator[Trouble]:
    cores, now = machine.cores, measured.threads
    factor = _ratio(measured, cores, now)
    if now == cores or (now > cores and factor < 1.02):
        return
    given = machine.variables.get("OMP_NUM_THREADS")
    why = f"OMP_NUM_THREADS={given}" if given else "PyTorch"
    how = f"{now} threads on {cores}" if now > cores else f"{now} of {cores}"
    yield Trouble(
        "threads",
        f"{why} lets programs compute with {how} core{'s' if cores > 1 else ''} (`tozan train` starts a thread on each "
        "of its own, others do not)",
        f"matrix products are {factor:.2f}× faster with {cores}",
        HERE,
        "unset OMP_NUM_THREADS" if given else f"export OMP_NUM_THREADS={cores}",
        factor,
    )


def _affinity(machine: Hardware, measured: Measured) -> Iterator[Trouble]:
    if machine.cores >= machine.machine_cores:
        return
    fixes = {
        "mpirun": "mpirun --bind-to none … (tozan launch does it)",
        "slurm": f"srun --cpu-bind=none --cpus-per-task={machine.online} …",
        "torchrun": f"taskset -c 0-{machine.online - 1} torchrun …",
    }
    before = max((rate for (name, _), rate in measured.gemm.items() if name == "fp32"), default=0.0)
    if measured.all_cores and before:
        factor, source = measured.all_cores / before, HERE
    else:
        factor, source = machine.machine_cores / machine.cores, "cores of the machine over cores of this process"
    yield Trouble(
        "affinity",
        f"this process may run on {machine.cores} of {many(machine.machine_cores, 'core')}",
        f"matrix products would be {factor:.2f}× faster on all of them",
        source,
        fixes.get(measured.launcher, f"taskset -cp 0-{machine.online - 1} $$"),
        factor,
    )


def _quota(machine: Hardware, _: Measured) -> Iterator[Trouble]:
    if machine.quota is None or machine.quota >= machine.cores:
        return
    factor = machine.cores / machine.quota
    yield Trouble(
        "quota",
        f"the container gets the time of {machine.quota:.3g} cores, but shows {machine.cores}",
        f"threads stand still {percent(1 - 1 / factor)} of the time, all at once",
        "cores that are shown over cores that are given (cgroup)",
        f"--train.threads={max(1, int(machine.quota))}, or ask for more (docker run --cpus={machine.cores})",
        factor,
    )


def _load(machine: Hardware, _: Measured) -> Iterator[Trouble]:
    factor = (machine.load + machine.affinity) / machine.online
    if machine.load > 0.5 * machine.online:
        yield Trouble(
            "load",
            f"{machine.load:.1f} other threads want to run on {many(machine.online, 'hardware thread')}",
            f"a process with all cores gets 1/{factor:.1f} of them, and everything here is measured so",
            "(load average + own threads) / cores",
            "top -o %CPU   # see who they are, and wait or end them",
            factor,
        )


def _allocator(machine: Hardware, measured: Measured) -> Iterator[Trouble]:
    if measured.kept or machine.preloaded:
        return
    factor = measured.small_pages / measured.reused if measured.reused else None
    yield Trouble(
        "allocator",
        "this C library gives freed memory back to the kernel, and cannot be told to keep it",
        f"a new buffer of 64 MiB costs {scaled(measured.fresh, 's')} to fill",
        HERE,
        "LD_PRELOAD=libtcmalloc.so.4 tozan train …",
        factor,
    )


def _huge_pages(machine: Hardware, measured: Measured) -> Iterator[Trouble]:
    tunables = machine.variables.get("GLIBC_TUNABLES", "")
    if machine.preloaded or machine.huge_pages == "always" or "hugetlb" in tunables or not machine.huge_pages:
        return
    never = machine.huge_pages == "never"
    gain = measured.small_pages / measured.large_pages if measured.large_pages and not never else None
    touch = "" if gain is None else f"; memory is touched for the first time {gain:.2f}× faster in huge pages here"
    yield Trouble(
        "huge pages",
        "transparent huge pages are " + ("off" if never else "given only to those who ask, and glibc does not ask"),
        "about 5% of a step" + touch,
        "GPT-2 124M with tcmalloc on 2 cores with AMX, 2026-11" + ("" if gain is None else f"; the rest {HERE}"),
        "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        if never
        else "export GLIBC_TUNABLES=glibc.malloc.hugetlb=1",
        1.05,
    )


def _precision(_: Hardware, measured: Measured) -> Iterator[Trouble]:
    best = {name: max((rate for (n, _), rate in measured.gemm.items() if n == name), default=0.0) for name in _TYPES}
    if best["bf16"] and best["fp32"] > 1.05 * best["bf16"]:
        factor = best["fp32"] / best["bf16"]
        yield Trouble(
            "precision",
            "this processor has no fast bf16 products, and bf16 is the default",
            f"fp32 products are {factor:.2f}× faster",
            HERE,
            "--train.precision=fp32",
            factor,
        )


def _domains(machine: Hardware, measured: Measured) -> Iterator[Trouble]:
    count = len(machine.domain_cores)
    if count > 1 and measured.launcher == "none":
        yield Trouble(
            "domains",
            f"one process over {count} NUMA domains computes on memory that lies in another one",
            f"memory of the farthest domain is {machine.distance:.2g}× as far",
            "the firmware's table (node0/distance)",
            f"tozan launch run.toml --layout.data={count}   # one rank in each domain",
            machine.distance,
        )


def _memory(machine: Hardware, _: Measured) -> Iterator[Trouble]:
    limit = min(machine.available, machine.memory_limit or machine.available)
    if limit and limit < 5e9:
        yield Trouble(
            "memory",
            f"{scaled(limit, 'B')} of memory can be had",
            "GPT-2 124M takes about 5 GB at micro-batch 4",
            "docs/lab-notes.md",
            "free -h; or --train.micro_batch=1 --train.recompute=full",
        )
    if machine.shared_memory < 64 << 20:
        yield Trouble(
            "shared memory",
            f"/dev/shm holds {scaled(machine.shared_memory, 'B')}",
            "an mpirun on this node takes about 4 MB for each rank there; a full one ends processes with a bus error",
            "OpenMPI 4.1, segments of its shared-memory transport",
            "docker run --shm-size=8g …, or: sudo mount -o remount,size=8G /dev/shm",
        )


def _files(machine: Hardware, _: Measured) -> Iterator[Trouble]:
    most = machine.limits.get("nofile")
    if most is not None and most < 4096:
        yield Trouble(
            "open files",
            f"a process may open {most:,} files",
            f"ranks of a job of more than about {most // 4:,} cannot connect: gloo opens a socket to each peer of each "
            "group, and a layout has up to four groups",
            "sockets of a full mesh",
            "ulimit -n 65536",
        )


def _clock(machine: Hardware, measured: Measured) -> Iterator[Trouble]:
    if measured.clock > 3e-7:
        yield Trouble(
            "clock",
            f"the clock source {machine.clock} is slow",
            f"{measured.clock * 1e9:.0f} ns for each time stamp; the time-stamp counter takes about 50",
            HERE,
            "echo tsc | sudo tee /sys/devices/system/clocksource/clocksource0/current_clocksource",
        )


def _network(machine: Hardware, measured: Measured) -> Iterator[Trouble]:
    outside = [one for one in machine.interfaces if one.up and one.name != "lo" and one.addresses]
    known = [one for one in outside if one.bits_per_second]
    if known and all((one.bits_per_second or 0) < 10e9 for one in known):
        best = max(known, key=lambda one: one.bits_per_second or 0)
        speed = best.bits_per_second or 1.0
        yield Trouble(
            "network",
            f"the fastest interface, {best.name}, has {speed / 1e9:.3g} Gbit/s",
            f"the gradients of 124M (0.5 GB) take {8 * GRADIENTS / speed:.1f} s between two nodes, at least",
            "2(n-1)/n × bytes / speed for n = 2",
            "--train.accumulate=8   # more computing for each exchange",
        )
    if machine.own_name_is_loopback and outside and "GLOO_SOCKET_IFNAME" not in machine.variables:
        yield Trouble(
            "host name",
            "/etc/hosts gives this host's own name a loopback address (tozan looks for the route itself)",
            "0 other hosts can connect: jobs of other programs over several hosts end with `connection refused`",
            "gloo listens at the address of the host's name",
            f"export GLOO_SOCKET_IFNAME={outside[0].name}",
        )
    if measured.launcher_error:
        yield Trouble(
            "launcher", measured.launcher_error, "no job of more than 1 process starts", HERE, "unset RANK WORLD_SIZE"
        )


def _ratio(measured: Measured, more: int, fewer: int) -> float:
    """How much faster the best precision is with more threads."""
    both = [name for name in _TYPES if (name, more) in measured.gemm and (name, fewer) in measured.gemm]
    if not both:
        return more / fewer
    best = max(both, key=lambda name: measured.gemm[name, more])
    return measured.gemm[best, more] / measured.gemm[best, fewer]


_TYPES = ("bf16", "fp32", "fp16")
RULES: tuple[Callable[[Hardware, Measured], Iterator[Trouble]], ...] = (
    *(_threads, _affinity, _quota, _load, _allocator, _huge_pages, _precision, _domains, _memory, _files, _clock),
    _network,
)
