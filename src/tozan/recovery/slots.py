"""A rank's state in memory that outlives it: two slots written in turn, each valid only once it is complete.

The memory is a file without a name (`memfd_create`) that the agent makes and the rank inherits. Nobody else can open it
and it is gone with the agent. A rank that dies while it writes one slot leaves the other, which holds the step before.

| bytes | what |
|---|---|
| 0–15 | the step that the rank has begun last, and the first it has begun in this process (two little-endian u64) |
| 16–23 | of an outbox: one more than the step of the copy that has arrived at the neighbour; 0: none (u64) |
| 64, 128 | a record per slot: magic, step, bytes of head and body, checksum of the body, CRC-32 of head and record |
| 4096… | slot 0, then slot 1: head (JSON) up to `HEAD` bytes, then the body (raw bytes) |

A record is cleared before its slot is written and set afterwards. The checksum is the sum of the body's 64-bit words
modulo 2^64, which every single flipped bit changes and which costs one pass over memory.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import zlib
from typing import Any, Self

import numpy as np

PAGE = 4096
HEAD = 1 << 16
"""Bytes set aside for a slot's head."""
_RECORD = struct.Struct("<8sQQQQI")
_RECORDS_AT = (64, 128)
_ARRIVED_AT = 16
_MAGIC = b"tozan c1"


def create(name: str) -> int:
    """New memory as a file descriptor, inheritable."""
    descriptor = os.memfd_create(name, 0)
    os.ftruncate(descriptor, PAGE)
    return descriptor


def checksum(body: memoryview) -> int:
    """Sum of little-endian 64-bit words modulo 2^64; the body is a whole number of them."""
    with np.errstate(over="ignore"):
        return int(np.frombuffer(body, "<u8").sum(dtype=np.uint64))


def begun(descriptor: int) -> tuple[int, int]:
    """(the step begun last, the first that was begun since `clear_begun`); zeros before the first."""
    last, first = struct.unpack("<QQ", os.pread(descriptor, 16, 0))
    return last, first


def clear_begun(descriptor: int) -> None:
    """Note that no step was begun yet."""
    os.pwrite(descriptor, bytes(16), 0)


def note_arrival(descriptor: int, step: int | None) -> None:
    """Note in an outbox that the copy of a step has arrived at the neighbour; None: nothing of it is there."""
    os.pwrite(descriptor, struct.pack("<Q", 0 if step is None else step + 1), _ARRIVED_AT)


def steps_of(descriptor: int) -> list[int]:
    """Steps of complete and undamaged copies in a file, ascending."""
    with Slots(descriptor) as held:
        return held.steps()


class Slots:
    """The two slots of one rank, seen from the rank or from its agent.

    Args:
        descriptor: from `create`.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, os.fstat(descriptor).st_size)

    def begin(self, step: int) -> None:
        """Note that `step` was begun."""
        first = struct.unpack_from("<QQ", self._map, 0)[1]
        struct.pack_into("<QQ", self._map, 0, step, first or step)

    def steps(self) -> list[int]:
        """Steps of complete and undamaged copies, ascending. Reads them through."""
        return sorted(step for slot in (0, 1) if (step := self._valid(slot)) is not None)

    def newest(self) -> int | None:
        """The newest step with a whole record, whose body is not looked at."""
        return max((record[1] for slot in (0, 1) if (record := self._record(slot))), default=None)

    def arrived(self) -> int | None:
        """The step of the copy that has arrived at the neighbour (see `note_arrival`)."""
        after: int = struct.unpack_from("<Q", self._map, _ARRIVED_AT)[0]
        return after - 1 if after else None

    def check(self, step: int) -> int:
        """The checksum that the record of a step states."""
        return next((record[4] for slot in (0, 1) if (record := self._record(slot)) and record[1] == step), 0)

    def body(self, length: int) -> memoryview:
        """The body of the slot to write next, of `length` bytes; its record is cleared, and `commit` sets it.

        Raises:
            OSError: there is no memory left.
        """
        self._make_room(length)
        slot = self._oldest()
        self._map[_RECORDS_AT[slot] : _RECORDS_AT[slot] + _RECORD.size] = bytes(_RECORD.size)
        start = self._start(slot) + HEAD
        return memoryview(self._map)[start : start + length]

    def commit(self, step: int, head: dict[str, Any], length: int, check: int) -> None:
        """Declare the body last handed out complete.

        Raises:
            ValueError: the head is too long.
        """
        text = json.dumps(head).encode()
        if len(text) > HEAD:
            raise ValueError(f"the head of a copy has {len(text)} bytes, more than {HEAD}")
        slot = self._oldest()
        start = self._start(slot)
        self._map[start : start + len(text)] = text
        fields = (_MAGIC, step, len(text), length, check % 2**64)
        _RECORD.pack_into(self._map, _RECORDS_AT[slot], *fields, _crc(fields, text))

    def read(self, step: int) -> tuple[dict[str, Any], memoryview] | None:
        """Head and body of the copy of a step, checked; None if there is no good one."""
        for slot in (0, 1):
            if self._valid(slot) == step:
                _, _, head, length, _ = self._record(slot) or (b"", 0, 0, 0, 0)
                start = self._start(slot)
                body = memoryview(self._map)[start + HEAD : start + HEAD + length]
                return json.loads(self._map[start : start + head]), body
        return None

    def forget(self, after: int = -1) -> None:
        """Drop the copies of all steps beyond `after`."""
        for slot, at in enumerate(_RECORDS_AT):
            record = self._record(slot)
            if record is None or record[1] > after:
                self._map[at : at + _RECORD.size] = bytes(_RECORD.size)

    def close(self) -> None:
        """Unmap; views that are still about keep the memory."""
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _oldest(self) -> int:
        """The slot to write: an empty one, else that of the lower step."""
        steps = [-1 if (record := self._record(slot)) is None else record[1] for slot in (0, 1)]
        return steps.index(min(steps))

    def _start(self, slot: int) -> int:
        return PAGE + slot * ((len(self._map) - PAGE) // 2)

    def _make_room(self, length: int) -> None:
        size = -(-(HEAD + length) // PAGE) * PAGE
        if len(self._map) >= PAGE + 2 * size:
            return
        self.forget()  # another size is another layout: what is there means nothing any more
        os.posix_fallocate(self._descriptor, 0, PAGE + 2 * size)
        self._map = mmap.mmap(self._descriptor, PAGE + 2 * size)

    def _record(self, slot: int) -> tuple[bytes, int, int, int, int] | None:
        """A record that is set and whole, without its CRC."""
        *fields, crc = _RECORD.unpack_from(self._map, _RECORDS_AT[slot])
        magic, _, head, length, _ = fields
        start = self._start(slot)
        if magic != _MAGIC or head > HEAD or start + HEAD + length > len(self._map):
            return None
        text = self._map[start : start + head]
        return tuple(fields) if crc == _crc(fields, text) else None

    def _valid(self, slot: int) -> int | None:
        """The step of a slot whose body has its checksum."""
        record = self._record(slot)
        if record is None:
            return None
        start = self._start(slot) + HEAD
        body = memoryview(self._map)[start : start + record[3]]
        return record[1] if checksum(body) == record[4] else None


def _crc(fields: tuple[Any, ...] | list[Any], head: bytes) -> int:
    return zlib.crc32(repr(tuple(fields)).encode(), zlib.crc32(head))
