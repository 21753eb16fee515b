"""What the hosts of `tozan.chaos.hosts` listen on, are connected to, and can reach."""

from __future__ import annotations

import array
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tozan.chaos.hosts import Host

_OPEN, _LISTEN = "01", "0A"
_CONNECT = """
import socket, sys
for port in sys.argv[2:]:
    try:
        socket.create_connection((sys.argv[1], int(port)), timeout=2).close()
    except OSError:
        continue
    print(port)
"""


def connected(host: Host, port: int) -> int:
    """Connections to a port of a host that are open, both ends told apart by the kernel's table."""
    table = Path("/proc", str(host.processes()[0]), "net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == _OPEN for line in table)


def listening(host: Host) -> set[tuple[str, int]]:
    """(address, port) of every socket on which a process of a host listens, as the kernel has them."""
    found = {}
    processes = [Path("/proc", str(process)) for process in host.processes()]
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in (processes[0] / "net" / table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == _LISTEN:
                address, port = local.split(":")
                words = array.array("I", bytes.fromhex(address))
                words.byteswap()  # the kernel prints words of 32 bits, each in the machine's order
                found[f"socket:[{inode}]"] = socket.inet_ntop(family, words.tobytes()), int(port, 16)
    held = set()
    for process in processes:
        for descriptor in (process / "fd").iterdir():
            with suppress(OSError):
                held.add(str(descriptor.readlink()))
    return {where for name, where in found.items() if name in held}


def reaches(host: Host, address: str, ports: Iterable[int]) -> set[int]:
    """The ports at an address to which a host can connect."""
    done = subprocess.run(
        host.command([sys.executable, "-c", _CONNECT, address, *map(str, ports)]), capture_output=True, text=True
    )
    return set(map(int, done.stdout.split()))
