"""Faults of the network between hosts: cables, one-way silence, resets, slow and lossy links."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import Popen, TimeoutExpired

from tozan.chaos.faults import KINDS, MEMORY_LOST, NETWORK, Fault
from tozan.chaos.hosts import Host

PORT = 29_473
"""Where the leading agent listens."""
_MOMENT, _LONG, _GOODBYE = 0.3, 60.0, 60.0


class Network:
    """Hosts whose network fails.

    Args:
        hosts: the first one's agent leads.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = hosts

    def kinds(self) -> dict[str, int]:
        """Kinds of faults that this kernel can make, and how often each comes."""
        without = set() if resettable(self.hosts[0]) else {"agents' connection reset", "rank's connections reset"}
        every = NETWORK | KINDS
        return {kind: weight for kind, weight in every.items() if kind not in without | MEMORY_LOST}

    def train(self, words: Sequence[str], output: Path, environment: dict[str, str]) -> int:
        """Run `tozan agent WORDS` on every host; returns the leading one's exit status."""
        secret = secrets.token_hex(32)
        agents = [self._start(number, words, output, environment, secret) for number in range(len(self.hosts))]
        try:
            status = agents[0].wait()
            for follower in agents[1:]:
                status = status or follower.wait(_GOODBYE)
        except TimeoutExpired:
            status = 1
        finally:
            for agent in agents:
                agent.kill()
                agent.wait()
        return status

    def act(self, fault: Fault, process: int, mark: Callable[[], None], resumed: Callable[[float], None]) -> None:
        """Let a fault happen to a host and end it.

        Args:
            fault: one of `faults.NETWORK`.
            process: the rank that is hit.
            mark: to be called when it happens.
            resumed: waits until the run goes on after a loss, for at most so many seconds.
        """
        number = 1 + int(fault.chance * (len(self.hosts) - 1))
        leader, host = self.hosts[0], self.hosts[number]
        moment = _MOMENT + fault.chance
        sender, receiver = (leader, host) if fault.number % 2 else (host, leader)
        lasting = fault.kind in ("cable out", "half-open")
        if fault.kind == "rank's connections reset":
            self._reset_rank(process, mark)
        elif fault.kind == "agents' connection reset":
            mark()
            host.reset(f"dport = :{PORT} dst {leader.address}")
        elif fault.kind in ("slow link", "lossy link"):
            mark()
            host.throttle(*("8mbit", "64kb") if fault.kind == "slow link" else ("20mbit", "6kb"))
            time.sleep(moment)
            host.unthrottle()
        elif fault.kind.startswith("half-open"):
            mark()
            sender.mute(receiver)
            resumed(_LONG) if lasting else time.sleep(moment)
            sender.unmute(receiver)
        else:
            mark()
            host.unplug()
            resumed(_LONG) if lasting else time.sleep(moment)
            host.plug()

    def _reset_rank(self, process: int, mark: Callable[[], None]) -> None:
        """All connections between a rank and other hosts are reset, as by a firewall that has lost its table.

        One alone may be of a group that is idle, and is then missed by nobody.
        """
        for host in self.hosts:
            found = host.connections(process)
            if found:
                mark()
            for mine, theirs in found:
                host.reset(f"src {mine} dst {theirs}")

    def _start(
        self, number: int, words: Sequence[str], output: Path, environment: dict[str, str], secret: str
    ) -> Popen[str]:
        variables = {"RANK": number, "WORLD_SIZE": len(self.hosts), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        meeting = {"MASTER_ADDR": self.hosts[0].name, "MASTER_PORT": PORT, "TOZAN_SECRET": secret}
        command = [sys.executable, "-m", "tozan", "agent", *words]
        return self.hosts[number].start(command, output, **variables, **meeting, **environment)


def resettable(host: Host) -> bool:
    """Whether this kernel lets connections be reset (`ss --kill`, CONFIG_INET_DIAG_DESTROY)."""
    words = [sys.executable, "-c", _PAIR]
    with host.start(words) as pair:
        try:
            assert pair.stdout is not None
            pair.stdout.readline()
            return host.reset("dst 127.0.0.1") > 0
        finally:
            pair.kill()


_PAIR = """
import signal, socket
listening = socket.create_server(("0.0.0.0", 0))
there = socket.create_connection(listening.getsockname())
print(flush=True)
signal.pause()
"""
