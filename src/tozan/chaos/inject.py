"""Faults inside a rank. Nothing of this is in the trainer: where faults may strike, functions are wrapped from here.

Wrapped are the start of a step, the ends of its phases (`Clock.mark`), the start of every collective (`Ledger.begin`),
the copy in memory (`Slots`), and each call that changes a file (`os`, see `tozan.files`).
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tozan.train.loop
from tozan.chaos.faults import GRADIENTS, MEMORY_BITS, Fault, Marks
from tozan.comm.ledger import Ledger
from tozan.recovery.slots import Slots
from tozan.train.clock import Clock
from tozan.train.outliers import ENOUGH

_FILE_CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")
_ERRORS = {"no space": errno.ENOSPC, "device error": errno.EIO, "read-only folder": errno.EROFS}
_SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}


def install() -> None:
    """Arm this process with the script that TOZAN_CHAOS names; called before the run is assembled."""
    told, agent = json.loads(os.environ["TOZAN_CHAOS"]), json.loads(os.environ["TOZAN_AGENT"])
    faults = [Fault(**words) for words in json.loads(Path(told["script"]).read_text())]
    rank, marks = int(os.environ["RANK"]), Marks(Path(told["marks"]), len(faults))
    marks.begin(rank, 0)
    mine = [f for f in faults if f.rank == rank and f.point != "outside" and not marks.get(f.number)[0]]
    injector = Injector(mine, marks, rank)
    injector.restarted(agent["resume"])
    wrap(injector)


class Injector:
    """Counts arrivals at points and lets faults happen.

    Args:
        faults: of this rank that have not happened yet, by step.
        marks: where to note those that do.
        rank: this one.
    """

    def __init__(self, faults: list[Fault], marks: Marks, rank: int) -> None:
        self.step, self.run, self._marks, self._rank = 0, None, marks, rank
        self._steps = 0
        self._waiting = faults
        self._arrivals: Counter[int] = Counter()
        self._lock = threading.RLock()

    def restarted(self, resumed: int | None) -> None:
        """Let faults of restarts that are due happen in this one."""
        due = next((f for f in self._restarts() if resumed is not None and resumed >= f.step - 1), None)
        if due is not None:
            self._waiting.remove(due)
            threading.Timer(due.delay, self._strike, [due, True]).start()

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step = step
        self._marks.begin(self._rank, step)
        self._steps += 1

    def reach(self, point: str) -> None:
        """This rank has come to a point: faults that were waiting for it happen, as exceptions or worse."""
        with self._lock:
            for fault in [f for f in self._waiting if f.step <= self.step and f.point == point]:
                self._arrivals[fault.number] += 1
                if self._arrivals[fault.number] >= fault.count:
                    self._happen(fault)
            if point == "optimizer" and any(f.step <= self.step for f in self._restarts()):
                os.kill(os.getpid(), signal.SIGKILL)  # for there to be a restart that can be disturbed

    def gradient(self, run: Any) -> Fault | None:
        """The fault, if any, that is to spoil a gradient of this step.

        A flipped bit waits until the trainer has seen enough steps to tell an odd one (see `tozan.train.outliers`).
        """
        self.run = run
        ready = {True: GRADIENTS, False: GRADIENTS - {"flipped gradient bit"}}[self._steps > ENOUGH + 1]
        due = (f for f in self._waiting if f.step <= self.step and f.point == "step" and f.kind in ready)
        found = next(due, None)
        if found is not None:
            self._note(found)
        return found

    def _restarts(self) -> list[Fault]:
        return [fault for fault in self._waiting if fault.point == "restart"]

    def _note(self, fault: Fault) -> None:
        self._waiting.remove(fault)
        self._marks.set(fault.number, self.step)

    def _happen(self, fault: Fault) -> None:
        if fault.delay:
            self._waiting.remove(fault)
            timer = threading.Timer(fault.delay, self._strike, [fault, True])
            timer.daemon = True
            timer.start()
        else:
            self._note(fault)
            self._strike(fault, False)

    def _strike(self, fault: Fault, late: bool) -> None:
        if late:
            self._marks.set(fault.number, self.step)
        name = fault.kind.partition(" ")[0] if fault.kind.startswith("kill") else fault.kind
        if name in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[name])
        elif fault.kind == "slow rank":
            time.sleep(0.03 + 0.12 * fault.chance)
        elif fault.kind in MEMORY_BITS:
            flip_memory(self.run, fault)
        elif fault.kind == "dropped connection":
            drop_connection(fault.chance)
        elif fault.kind in _ERRORS:
            raise OSError(_ERRORS[fault.kind], os.strerror(_ERRORS[fault.kind]), "injected")


def flip(tensor: torch.Tensor, at: int, bit: int) -> None:
    """Flip a bit of one element of an fp32 tensor, unseen by autograd, which counts the writes that it knows of."""
    tensor.detach().view(-1).numpy().view("int32")[at] ^= 1 << bit


def flip_memory(run: Any, fault: Fault) -> None:
    """Flip an exponent or high mantissa bit of a weight or of the optimizer's state."""
    chance = random.Random(fault.chance)
    weights = list(run.split.sync.parameters.values())
    tensors = weights if fault.kind == "flipped weight bit" else list(run.optimizer.tensors().values())
    tensor = chance.choice([t for t in tensors if t.numel()])
    flip(tensor, chance.randrange(tensor.numel()), chance.randint(20, 30))


def drop_connection(chance: float) -> None:
    """Close one of this process's TCP connections under its feet."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            duplicate = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        try:
            duplicate.getpeername()
            if duplicate.type == socket.SOCK_STREAM and duplicate.family in (socket.AF_INET, socket.AF_INET6):
                found.append(duplicate)
                continue
        except OSError:
            pass
        duplicate.close()
    if found:
        found[int(chance * len(found))].shutdown(socket.SHUT_RDWR)
    for duplicate in found:
        duplicate.close()


def wrap(injector: Injector) -> None:
    """Put the injector's points around the functions."""

    def before(owner: Any, name: str, act: Callable[..., None]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            act(*arguments)
            return original(*arguments, **options)

        setattr(owner, name, wrapped)

    before(Slots, "begin", lambda _, step: injector.begin(step))
    before(Slots, "commit", lambda *_: injector.reach("copy"))
    before(Ledger, "begin", lambda *_: injector.reach("collective"))
    before(Clock, "mark", lambda _, phase: injector.reach(phase))
    for name in _FILE_CALLS:
        before(os, name, lambda *_: injector.reach("file"))
    loop: Any = tozan.train.loop
    step = loop.train_step

    def train_step(run: Any, clock: Any) -> Any:
        fault = injector.gradient(run)
        if fault is None:
            return step(run, clock)
        with spoiled(run, fault):
            return step(run, clock)

    loop.train_step = train_step


class spoiled:  # noqa: N801 - a context manager
    """While inside, one element of one parameter's gradient is NaN, infinite, or has its highest bit flipped."""

    def __init__(self, run: Any, fault: Fault) -> None:
        parameters = [p for p in run.split.model.parameters() if p.requires_grad and p.numel()]
        self._chance = random.Random(fault.chance)
        self._parameter = self._chance.choice(parameters)
        self._value = {"nan gradient": math.nan, "inf gradient": math.inf}.get(fault.kind)

    def __enter__(self) -> None:
        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            bad = gradient.clone()
            if self._value is None:
                flip(bad, int(bad.abs().argmax()), 30)
            else:
                bad.view(-1)[self._chance.randrange(bad.numel())] = self._value
            return bad

        self._hook = self._parameter.register_hook(spoil)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
