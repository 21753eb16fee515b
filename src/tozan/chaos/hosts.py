"""Several hosts on one machine: network namespaces with names and addresses of their own, joined by veth and a bridge.

    with hosts.several(2) as (first, second):
        process = first.start([sys.executable, "worker.py"], MASTER_ADDR=first.name)
        second.unplug()                       # the link goes down: its connections are half open from now on
        second.plug()
        second.mute(first)                    # what second sends to first is lost on the way, and nobody is told

Each host has its own host name (UTS namespace), an interface `eth0` beside `lo`, and an /etc/hosts as Debian writes
it: its own name is 127.0.1.1 there, the others' names are their addresses. The bridge lies in a namespace of its own,
so the machine's network is left as it is. Files and processes are the machine's. Needs root and iproute2; no rule of a
firewall and no netem, which small kernels lack.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
_ADDRESS = "192.168.213.{}"
"""Above 127.0.0.1: with addresses below it (10.…) gloo was seen to connect although a rank listened on its loopback
address by mistake; with these it does not."""
_NOBODY = "02:00:00:00:00:00"
_ETC = Path("/etc/netns")
_HOSTNAME = 'hostname "$0" && exec "$@"'


def available() -> bool:
    """Whether namespaces can be made here."""
    if os.geteuid() or not all(shutil.which(tool) for tool in ("ip", "tc", "ss", "unshare", "hostname")):
        return False
    space = _space()
    made = subprocess.run(["ip", "netns", "add", space], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", space], check=True)
    return made


@dataclass(frozen=True)
class Host:
    """One of them.

    Attributes:
        name: host name, known to all.
        address: of its interface.
        space: its network namespace.
    """

    name: str
    address: str
    space: str

    def command(self, words: Sequence[str]) -> list[str]:
        """The words that run a command on this host."""
        inside = ["unshare", "--uts", "sh", "-c", _HOSTNAME, self.name, *map(str, words)]
        return ["ip", "netns", "exec", self.space, *inside]

    def start(self, words: Sequence[str], output: Path | None = None, **variables: object) -> subprocess.Popen[str]:
        """Start a command here; what it prints goes to a file, or is read from the pipes of the result."""
        with output.open("ab") if output else nullcontext(subprocess.PIPE) as where:
            return subprocess.Popen(
                self.command(words),
                env=os.environ | {name: str(value) for name, value in variables.items()},
                stdout=where,
                stderr=where,
                text=True,
            )

    def add_address(self, address: str) -> None:
        """Give it an interface more, which leads nowhere."""
        _ip("-n", self.space, "link", "add", "extra0", "type", "veth", "peer", "name", "extra1")
        _ip("-n", self.space, "address", "add", f"{address}/24", "dev", "extra0")
        for interface in ("extra0", "extra1"):
            _ip("-n", self.space, "link", "set", interface, "up")

    def unplug(self) -> None:
        """Take the link down: packets vanish both ways and nobody is told."""
        _ip("-n", self.space, "link", "set", INTERFACE, "down")

    def plug(self) -> None:
        """Bring the link up again."""
        _ip("-n", self.space, "link", "set", INTERFACE, "up")

    def mute(self, other: Host) -> None:
        """Send everything for another host to a card that nobody has: lost one way, while answers still come."""
        _ip("-n", self.space, "neighbour", "replace", other.address, "lladdr", _NOBODY, "dev", INTERFACE)

    def unmute(self, other: Host) -> None:
        """Find the other host's card again."""
        _ip("-n", self.space, "neighbour", "delete", other.address, "dev", INTERFACE)

    def throttle(self, rate: str, queue: str) -> None:
        """Let the link send no more than `rate` (as `8mbit`); what does not fit into its queue (as `64kb`) is lost."""
        words = ["root", "tbf", "rate", rate, "burst", "4kb", "limit", queue]
        _run("tc", "-n", self.space, "qdisc", "replace", "dev", INTERFACE, *words)

    def unthrottle(self) -> int:
        """Undo `throttle`; returns how many packets were lost."""
        shown = _run("tc", "-n", self.space, "-s", "qdisc", "show", "dev", INTERFACE, "root")
        _run("tc", "-n", self.space, "qdisc", "delete", "dev", INTERFACE, "root")
        return int(shown.partition("dropped ")[2].partition(",")[0])

    def connections(self, process: int) -> list[tuple[str, str]]:
        """A process's TCP connections to other hosts, as (own end, other end)."""
        lines = _run("ip", "netns", "exec", self.space, "ss", "-Htnp", "state", "established").splitlines()
        ends = [tuple(line.split()[2:4]) for line in lines if f"pid={process}," in line]
        return [(mine, theirs) for mine, theirs in ends if "127.0." not in theirs]

    def reset(self, condition: str) -> int:
        """Reset the TCP connections that a filter of `ss` selects, at both ends; returns how many there were."""
        return len(_run("ip", "netns", "exec", self.space, "ss", "-HKtn", *condition.split()).splitlines())

    def processes(self) -> list[int]:
        """All processes of this host."""
        return [int(word) for word in _ip("netns", "pids", self.space).split()]


@contextmanager
def several(count: int) -> Iterator[tuple[Host, ...]]:
    """Make hosts; at the end, their processes are killed and nothing of them is left, whatever happened."""
    switch = _space()
    made = [Host(f"node{number}", _ADDRESS.format(number + 1), _space()) for number in range(count)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, host in enumerate(made):
            _ip("netns", "add", host.space)
            _write_names(host, made)
            peer = ["peer", "name", f"port{number}", "netns", switch]
            _ip("link", "add", INTERFACE, "netns", host.space, "type", "veth", *peer)
            _ip("-n", switch, "link", "set", f"port{number}", "master", "bridge", "up")
            _ip("-n", host.space, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", host.space, "link", "set", interface, "up")
        yield tuple(made)
    finally:
        for host in made:
            _remove(host)
        subprocess.run(["ip", "netns", "delete", switch], capture_output=True)


def _space() -> str:
    return f"tozan-{os.getpid()}-{secrets.token_hex(3)}"


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _write_names(host: Host, everyone: Sequence[Host]) -> None:
    """`ip netns exec` puts the files of /etc/netns/<space> in the place of those in /etc."""
    folder = _ETC / host.space
    folder.mkdir(parents=True)
    lines = ["127.0.0.1 localhost", f"127.0.1.1 {host.name}"]
    lines += [f"{other.address} {other.name}" for other in everyone if other is not host]
    (folder / "hosts").write_text("\n".join([*lines, ""]))


def _remove(host: Host) -> None:
    with suppress(RuntimeError):
        for process in host.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", host.space], capture_output=True)
    shutil.rmtree(_ETC / host.space, ignore_errors=True)
