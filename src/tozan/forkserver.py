"""Starts ranks by fork from a process that has everything imported, so that a restart costs milliseconds, not imports.

Run by an agent (`tozan.recovery.node`) as `python -m tozan.forkserver DESCRIPTOR`, a socket of JSON messages:

    → {"start": "3", "words": ["train", "run.toml"], "environment": {...}, "told": {...}} with the descriptors of memory
                                                                                ← {"started": "3", "process": 4711}
    → {"store": "127.0.0.1"}                                                   ← {"store": 4712, "port": 40123}
    → {"signal": "3", "number": 9}
                                             ← {"stopped": "3"}, {"continued": "3"}, {"ended": "3", "status": 9}

It computes nothing and starts no thread, since only a process of one thread may be forked safely. Its children die
with it, and it dies with its agent.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from typing import Any

WARM = (
    *("torch", "torch.distributed", "torch.distributed.distributed_c10d"),
    *("tozan.cli", "tozan.train", "tozan.report.live", "tozan.recovery.slots", "tozan.chaos.inject"),
    *("tozan.checkpoint.reader", "tozan.models.gpt2", "tozan.models.llama", "pydantic.type_adapter"),
)
"""What a rank would otherwise import for itself."""
COMPILER = ("torch._dynamo", "torch._inductor")
"""The same of ranks that compile or recompute: 1,000 modules, which others do not need."""
STORE = "-1"
"""Stands for the store where others stand for a rank."""
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Signals that ask a run to stop. Slurm sends them to every process there is; here they are for ranks and agents."""
_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """Serve until the agent closes its end."""
    die_with_parent()
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    for module in WARM:
        importlib.import_module(module)
    agent = socket.socket(fileno=descriptor)
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    Server(agent, woken, wake).serve()
    os._exit(0)  # to take down an interpreter with torch in it takes seconds, and the agent waits


def die_with_parent() -> None:
    """Ask the kernel (Linux) for SIGKILL when the parent ends, however that comes about."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Server:
    """Forks children and reports what becomes of them."""

    def __init__(self, agent: socket.socket, woken: socket.socket, wake: socket.socket) -> None:
        self._agent, self._woken, self._wake = agent, woken, wake
        self._children: dict[int, str] = {}

    def serve(self) -> None:
        """Answer until the agent has closed its end."""
        self._say(ready=os.getpid())
        selector = selectors.DefaultSelector()
        selector.register(self._agent, selectors.EVENT_READ)
        selector.register(self._woken, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if self._woken in ready:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
                self._reap()
            if self._agent in ready:
                received, descriptors, _, _ = socket.recv_fds(self._agent, 1 << 18, 8)
                if not received:
                    return
                self._obey(json.loads(received), descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)

    def _obey(self, command: dict[str, Any], descriptors: list[int]) -> None:
        if "start" in command:
            for module in COMPILER if command["told"].get("compiler") else ():
                importlib.import_module(module)
            process = self._fork(lambda: _run(command, descriptors))
            self._children[process] = command["start"]
            self._say(started=command["start"], process=process)
        elif "store" in command:
            self._start_store(command["store"])
        else:
            for process, key in self._children.items():
                if key == command["signal"]:
                    os.kill(process, command["number"])

    def _start_store(self, host: str) -> None:
        reading, writing = os.pipe()
        process = self._fork(lambda: _hold_store(host, writing))
        os.close(writing)
        with os.fdopen(reading) as pipe:
            port = int(pipe.readline() or 0)
        self._children[process] = STORE
        self._say(store=process, port=port)

    def _fork(self, work: Any) -> int:
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            die_with_parent()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self._agent, self._woken, self._wake):
                end.close()
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        while self._children:
            try:
                process, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if process == 0:
                return
            key = self._children[process]
            if os.WIFSTOPPED(status):
                self._say(stopped=key)
            elif os.WIFCONTINUED(status):
                self._say(continued=key)
            else:
                del self._children[process]
                self._say(ended=key, status=status)

    def _say(self, **words: Any) -> None:
        self._agent.sendall(json.dumps(words).encode())


def _run(command: dict[str, Any], descriptors: list[int]) -> int:
    """Be `tozan WORDS`."""
    from tozan import cli

    for number in ASKING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    memory, outbox, source = descriptors
    told = command["told"] | {"memory": memory, "outbox": outbox, "source": source}
    os.environ.update(command["environment"], TOZAN_AGENT=json.dumps(told))
    if "TOZAN_CHAOS" in os.environ:
        from tozan.chaos import inject

        inject.install()
    return cli.main(command["words"])


def _hold_store(host: str, writing: int) -> int:
    """Hold the store through which the ranks of every generation find each other; never returns by itself."""
    from tozan.comm.rendezvous import serve

    store, _ = serve(host, 0, one_machine=host.startswith("127."))
    os.write(writing, f"{store.port}\n".encode())
    os.close(writing)
    while True:
        signal.pause()


if __name__ == "__main__":
    main(int(sys.argv[1]))
