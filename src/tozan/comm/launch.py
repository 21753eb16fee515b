"""Joining the job: from a started process to a mesh of ranks.

    with launch.join(layout) as mesh:      # refuses a layout that the job does not have the ranks for
        ...                                # train over mesh["dp"], ...

Every rank finds its place in the launcher's environment, picks the interface that leads to rank 0, binds itself to its
cores and starts the heartbeat. If a peer is lost, every process ends with one message (see `monitor`).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from tozan.amounts import many
from tozan.comm import binding, gloo, rendezvous
from tozan.comm.collectives import CommunicationError
from tozan.comm.ledger import Ledger
from tozan.comm.mesh import Axis, Mesh
from tozan.comm.monitor import NOWHERE, Monitor
from tozan.comm.place import Place, address_towards, called_loopback, check, find, interface_to, is_loopback, outward
from tozan.comm.speaker import Speaker
from tozan.comm.texts import all_gather_texts
from tozan.comm.witness import Witness, space
from tozan.cpuinfo import core_of, count_cores, parse
from tozan.errors import EXIT_LOST, Problem, UserError, say
from tozan.layout import Layout


@contextmanager
def join(
    layout: Layout,
    *,
    place: Place | None = None,
    timeout_s: float = 120.0,
    start_s: float = 0.0,
    lost_after_s: float = 12.0,
    threads: int = 0,
    debug: bool = False,
) -> Iterator[Mesh]:
    """Join the other ranks of the job and leave them at the end.

    Args:
        layout: must have exactly the job's number of ranks.
        place: this process; found in the environment by default.
        timeout_s: how long a collective may take before the run counts as hanging.
        start_s: how long ranks wait for one another here, and in collectives until `Monitor.settle`; `timeout_s` if
            that is more, or if they have started before (`Place.warm`).
        lost_after_s: seconds without a sign of life after which a rank counts as lost.
        threads: computing threads; 0 takes every core that this rank is bound to.
        debug: compare every operation across ranks before it starts.

    Yields:
        The mesh. In a world of one there is no process group and nothing is bound.

    Raises:
        UserError: the layout and the job differ in their numbers of ranks; rank 0 cannot listen where it should.
    """
    place = place or find()
    check(layout.world_size, place)
    if place.world_size == 1:
        yield Mesh.create(layout)
        return
    start_s = timeout_s if place.warm else max(start_s, timeout_s)
    place, store, _group, monitor, speaker, everyone = _gather(place, timeout_s, start_s, lost_after_s)
    bound = _bind(place, everyone, threads)
    if place.local_rank == 0 or place.local_size <= 8:
        say(f"rank {place.rank} of {place.world_size} on {socket.gethostname()}: {bound}")
    witness = _witness(place, store, everyone, speaker, monitor)
    # Longer than the heartbeat is patient, so that the message comes from there and not from gloo.
    patience_s = start_s + lost_after_s + 10
    try:
        mesh = Mesh.create(layout, timeout_s=patience_s, debug=debug, monitor=monitor)
        monitor.outside = NOWHERE
        yield mesh
    except CommunicationError as error:
        monitor.fall_silent()
        witness.tell(error)
        _linger(place, speaker, lost_after_s)
        os._exit(EXIT_LOST)
    except BaseException as error:
        monitor.stop(f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    _leave(place, store)
    monitor.stop()
    speaker.close()
    dist.destroy_process_group()


class _Rank(NamedTuple):
    """What a rank says of itself: its machine, and where process ids mean the same."""

    host: str
    space: str
    process: int
    local_rank: int
    cores: str
    listens: str


class _Joined(NamedTuple):
    """Where this rank is now known to be, and what it shares with the others."""

    place: Place
    store: Store
    """This generation's part of the job's store."""
    group: Store
    """The part of the group of all ranks, which must be kept for as long as that group."""
    monitor: Monitor
    speaker: Speaker
    everyone: list[_Rank]


def _gather(place: Place, timeout_s: float, start_s: float, lost_after_s: float) -> _Joined:
    """Find the other ranks and make the group of all of them; if one does not come, end with a line that says which."""
    store, monitor, speaker = None, None, Speaker(place.rank == 1 or place.local_rank == 0)
    try:
        if place.local_size < place.world_size:
            place = replace(place, master=outward(place.master))
        raw, place = _meet(place, start_s)
        # An agent's store outlives the ranks: what earlier ones have left there is not for these.
        store = _part(raw, f"generation {place.generation}")
        store.set(f"here/{place.rank}", "")
        monitor = _monitor(place, speaker, timeout_s, start_s, lost_after_s)
        monitor.outside = "the start, where ranks join"
        monitor.start()
        interface = _interface(place, store)
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        group = _part(raw, f"group {place.generation}")
        wait, rank, world_size = timedelta(seconds=start_s), place.rank, place.world_size
        dist.init_process_group(gloo.backend(), store=group, rank=rank, world_size=world_size, timeout=wait)
        return _Joined(place, store, group, monitor, speaker, _introduce(place, speaker))
    except (RuntimeError, TimeoutError) as error:  # torch's and our own, for what does not come
        _say_who_is_missing(place, store, monitor, speaker, error)
        _linger(place, speaker, lost_after_s)
        os._exit(EXIT_LOST)


def _linger(place: Place, speaker: Speaker, lost_after_s: float) -> None:
    """Stay a moment where others still look: rank 0 may hold the store, and the next ones speak in its place."""
    if (place.rank == 0 or speaker.stays) and not place.hosted:
        time.sleep(lost_after_s / 3)


def _say_who_is_missing(
    place: Place, store: Store | None, monitor: Monitor | None, speaker: Speaker, error: Exception
) -> None:
    """Print one line for all ranks; where there is no store to agree in, one for each machine.

    Who came and has died since is the monitor's business: if everyone came, it has a moment to say so.
    """
    what = f"rank {place.rank} could not join the others at {place.master}:{place.port}: {error}".splitlines()[0]
    speaks = speaker.speaks()
    if store is not None:
        with suppress(RuntimeError):
            if monitor and store.check([f"here/{rank}" for rank in range(place.world_size)]):
                monitor.failed("the start, where ranks join")
            speaks = store.add("not joined", 1) == 1
            missing = _absent(place, store) if speaks else []
            if missing:
                ranks = f"rank{'' if len(missing) == 1 else 's'} {', '.join(map(str, missing[:8]))}"
                more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
                what = f"{ranks}{more} did not come to {place.master}:{place.port}, where ranks meet"
    if speaks:
        say(what)
    if monitor:
        monitor.fall_silent()
        monitor.spread("a rank has not joined")


def _absent(place: Place, store: Store) -> list[int]:
    """Ranks that have not come."""
    return [rank for rank in range(place.world_size) if not store.check([f"here/{rank}"])]


def _monitor(place: Place, speaker: Speaker, timeout_s: float, start_s: float, lost_after_s: float) -> Monitor:
    """This rank's heartbeat, over a connection of its own: others may wait for answers."""
    return Monitor(
        _part(_connect(place, start_s), f"monitor {place.generation}"),
        place.rank,
        place.world_size,
        Ledger(),
        interval=lost_after_s / 6,
        lost_after=lost_after_s,
        hang_after=timeout_s,
        start_after=start_s,
        speaker=speaker,
        explain=not place.restarts,  # an agent knows who was lost, and everyone is to leave at once
    )


def _meet(place: Place, timeout_s: float) -> tuple[TCPStore, Place]:
    """The store of the job, which rank 0 holds unless the launcher does, and where it is; rank 0 says so."""
    one_machine = place.local_size == place.world_size
    signed = "signed with the job's secret" if rendezvous.secret() else "not signed (TOZAN_SECRET is not set)"
    if place.rank != 0 or place.hosted:
        if place.rank == 0 and place.generation <= 1:
            say(f"ranks meet at the launcher's {place.master}:{place.port}, {signed}")
        if not (place.hosted or one_machine) and called_loopback(place.master):  # rank 0's machine, of many addresses
            place = replace(place, master=rendezvous.ask(place.master, place.port, timeout_s))
        return _connect(place, timeout_s), place
    try:
        store, address = rendezvous.serve(place.master, place.port, one_machine=one_machine, timeout_s=timeout_s)
    except TimeoutError:
        raise
    except OSError as error:
        what = f"rank 0 cannot listen on {place.master}:{place.port}: {error.strerror or error}"
        fix = "give an address or name of the first node, and a port that is free there"
        raise UserError(Problem("MASTER_ADDR, MASTER_PORT", what, fix)) from error
    say(f"rank 0 listens on {address}:{store.port}, {signed}")
    return store, place if one_machine else replace(place, master=address)


def _connect(place: Place, timeout_s: float) -> TCPStore:
    wait = timedelta(seconds=timeout_s)
    return TCPStore(place.master, place.port, place.world_size, False, timeout=wait, wait_for_workers=False)


def _part(store: TCPStore, name: str) -> Store:
    """A part of the store with keys of its own, signed if the job has a secret."""
    part, key = PrefixStore(name, store), rendezvous.secret()
    return rendezvous.Signed(part, key, name) if key else part


def _interface(place: Place, store: Store) -> str | None:
    """The interface that leads to the other ranks.

    That is the one towards rank 0, but not on rank 0's own host, whose name may be a loopback address there (Debian
    writes 127.0.1.1): it takes the one towards a rank of another host.
    """
    towards = place.master
    if place.local_size < place.world_size:
        mine = address_towards(place.master)
        store.set(f"address/{place.rank}", mine)
        if is_loopback(mine):
            addresses = (store.get(f"address/{rank}").decode() for rank in range(place.world_size))
            towards = next((address for address in addresses if not is_loopback(address)), towards)
    return interface_to(towards)


def _introduce(place: Place, speaker: Speaker) -> list[_Rank]:
    """Every rank, in order: a collective of the group of all."""
    several = place.local_size < place.world_size
    listens = speaker.listen(address_towards(place.master)) if several and speaker.may and place.rank else ""
    cores = binding.ranges(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ""
    mine = _Rank(socket.gethostname(), space(), os.getpid(), place.local_rank, cores, listens)
    ranks = tuple(range(place.world_size))
    # With a ledger of its own: this is no part of the run.
    everyone = Axis("world", place.world_size, place.rank, ranks, dist.group.WORLD, Ledger())
    said = [_Rank(*json.loads(text)) for text in all_gather_texts(json.dumps(mine), everyone, name="introduction")]
    speaker.introduce([it.listens for it in said], place.rank)
    return said


def _witness(place: Place, store: Store, everyone: list[_Rank], speaker: Speaker, monitor: Monitor) -> Witness:
    mine = everyone[place.rank]
    seen = {rank: it.process for rank, it in enumerate(everyone) if (it.host, it.space) == (mine.host, mine.space)}
    # A store may have known other ranks before these: the first one's process tells them apart.
    claim = f"spoken/{everyone[0].process}"
    return Witness(place.rank, store, claim, seen, speaker.speaks, monitor.spread)


def _bind(place: Place, everyone: list[_Rank], threads: int) -> str:
    """Bind this rank; returns what was done, in words."""
    if not everyone[place.rank].cores:
        return "not bound (this system cannot)"
    host = everyone[place.rank].host
    neighbours = sorted((it.local_rank, parse(it.cores)) for it in everyone if it.host == host)
    whole = core_of()
    chosen = binding.decide(
        [local for local, _ in neighbours].index(place.local_rank),
        [cores for _, cores in neighbours],
        binding.numa_domains(),
        whole,
    )
    binding.bind(chosen)
    torch.set_num_threads(threads or count_cores(chosen.cores, whole))
    return f"{chosen}, {many(torch.get_num_threads(), 'thread')}"


def _leave(place: Place, store: Store) -> None:
    """Rank 0 may hold the store, so it leaves last."""
    if store.add("left", 1) == place.world_size:
        store.set("all left", "1")
    if place.rank == 0 and not place.generation:
        store.wait(["all left"])
