"""Loading: every byte that is used is checked against the manifest while it is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import Tensor

from tozan import files, layout
from tozan.checkpoint import folders, manifest
from tozan.checkpoint.crew import Alone, Crew, pool, settle
from tozan.checkpoint.manifest import Entry, Manifest, Part, part_bytes
from tozan.checkpoint.state import DTYPES, Box, Pieces, State, raw
from tozan.errors import Problem, UserError

_DAMAGED = "use another checkpoint: this one is damaged"
P = ParamSpec("P")
_Place = tuple[str, Entry, Part]


def load(folder: Path, only: str = "", into: Mapping[str, Tensor] | None = None) -> State:
    """Read a checkpoint back, bit for bit, and check every byte that is read.

    Memory mapping is avoided on purpose: a file that shrinks or a device that fails would then end the process
    with a signal instead of an error that names the file.

    Args:
        folder: one checkpoint, `.../step-00000100`.
        only: read only tensors whose names begin with this, as in `model/`; other tensor files are not opened.
        into: tensors to fill, by name, instead of allocating new ones; each must be in the checkpoint with this
            shape and dtype. After an error their contents are undefined.

    Returns:
        The state; its tensors are those of `into` where given.

    Raises:
        UserError: something is missing, too much, damaged, or does not fit `into`: names file and tensor.
    """
    table = manifest.read(folder)
    _refuse(_listing(folder, table, only))
    contents = {name: _small(folder, table, name) for name, file in table.files.items() if file.header is None}
    trainer = _trainer(folder / "trainer.json", contents.pop("trainer.json"))
    tensors = dict(_tensors(folder, table, only, into))
    return State(step=trainer["step"], tensors=tensors, meta=trainer["meta"], files=contents)


def _trainer(path: Path, data: bytes) -> dict[str, Any]:
    """Read `trainer.json`, which whoever can write checksums can fill with anything."""
    try:
        found = json.loads(data)
        if isinstance(found["step"], int) and isinstance(found["meta"], dict):
            return dict(found)
        what = "its step is no whole number, or its meta no object"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    raise UserError(Problem(str(path), f"does not say where the training stood: {what}", _DAMAGED))


def stream(folder: Path, only: str = "", into: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint one after the other, checked, so that no two need to be in memory.

    Takes and raises what `load` does.
    """
    table = manifest.read(folder)
    _refuse(_listing(folder, table, only))
    yield from _tensors(folder, table, only, into)


@torch.no_grad()
def fill(folder: Path, into: Mapping[str, Pieces]) -> None:
    """Fill boxes of global tensors from a checkpoint, whatever boxes it was written in.

    Only parts that overlap a box are read, each through a buffer of 1 MiB and checked as a whole; nothing larger than
    the buffer is allocated.

    Args:
        folder: one checkpoint.
        into: the boxes to fill, by the name of their tensor; after an error their contents are undefined.

    Raises:
        UserError: a tensor is missing or has another shape or dtype, or a part is damaged: names file and tensor.
    """
    table = manifest.read(folder)
    _refuse(_misfits(folder, table, "", into))
    wanted: dict[str, list[_Place]] = {}
    for name, pieces in into.items():
        entry = table.tensors[name]
        for part in entry.parts:
            if any(box.overlap(part.offset, part.shape) for box in pieces.boxes):
                wanted.setdefault(part.file, []).append((name, entry, part))
    for file, places in sorted(wanted.items()):
        with _open(folder / file) as descriptor:
            offsets = _offsets(folder, table, file, descriptor)
            for place in _in_order(folder, file, offsets, places):
                _read_part(folder, descriptor, offsets, place, into[place[0]].boxes)


def verify(folder: Path, only: str = "", share: tuple[int, int] = (0, 1)) -> list[Problem]:
    """Read a checkpoint through and list what is wrong with it.

    Args:
        folder: one checkpoint.
        only: look only at tensors whose names begin with this.
        share: (i, n): read only every n-th file, beginning with the i-th; n readers together have read all.

    Returns:
        All problems found; empty if the checkpoint is good.
    """
    try:
        table = manifest.read(folder)
        problems = _listing(folder, table, only)
    except UserError as error:
        return error.problems
    bad = {problem.where for problem in problems}
    places = _by_file(table, only)
    names = [name for name, file in sorted(table.files.items()) if file.header is None or name in places]
    for name in names[share[0] :: share[1]]:
        if str(folder / name) in bad:
            continue
        if name in places:
            problems += _problems(_scan, folder, table, name, places[name])
        else:
            problems += _problems(_small, folder, table, name)
    return problems


def newest(root: Path, on_damaged: Callable[[Problem], None], only: str = "", crew: Crew | None = None) -> Path | None:
    """The newest checkpoint that is good, looking from the newest to the oldest.

    Args:
        root: the folder of checkpoints; it need not exist.
        on_damaged: told about every problem of each checkpoint that was passed over.
        only: judge checkpoints only by tensors whose names begin with this.
        crew: ranks that share the reading and come to the same answer; all of them call this. Default: alone.

    Returns:
        The checkpoint's folder, or None if there is none at all.

    Raises:
        UserError: there are checkpoints and all are damaged; starting over is then for the user to decide.
    """
    crew = crew or Alone()
    found, everything = _candidates(root, crew), list[Problem]()
    for path in found:
        problems = pool(crew, verify(path, only, (crew.rank, crew.size)))
        if not problems:
            return path
        for problem in problems:
            on_damaged(problem)
        everything += problems
    if everything:
        fix = f"move {root} away to start from the beginning"
        raise UserError(*everything, Problem(str(root), f"all {len(found)} checkpoints are damaged", fix))
    return None


def _candidates(root: Path, crew: Crew) -> list[Path]:
    """The checkpoints that rank 0 finds, newest first: ranks on other hosts may still see an older listing."""
    names, error = "", None
    if crew.rank == 0 and root.exists():
        try:
            names = "\n".join(path.name for path in reversed(folders.steps(root).values()))
        except UserError as refused:
            error = refused
    return [root / name for name in settle(crew, error, names).split()]


def resolve(path: Path, on_damaged: Callable[[Problem], None] = lambda _: None, only: str = "") -> Path:
    """Find the checkpoint a user means.

    Args:
        path: one checkpoint, a folder of checkpoints, or a run folder (with `checkpoints/` in it); of several
            checkpoints the newest good one is taken.
        on_damaged: told about the problems of newer, damaged ones; by default they are passed over in silence.
        only: judge checkpoints only by tensors whose names begin with this.

    Raises:
        UserError: there is none, or all are damaged.
    """
    if (path / manifest.NAME).exists() or (path.is_dir() and folders.step_of(path) is not None):
        return path
    for root in (path / "checkpoints", path):
        if root.is_dir():
            found = newest(root, on_damaged, only)
            if found is not None:
                return found
    raise folders.missing(path)


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise UserError(*problems)


def _problems(read: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> list[Problem]:
    """What `read` complains about."""
    try:
        read(*args, **kwargs)
    except UserError as error:
        return error.problems
    return []


def _by_file(table: Manifest, only: str) -> dict[str, list[_Place]]:
    """The wanted parts of tensors by the file they are in."""
    wanted: dict[str, list[_Place]] = {}
    for name, entry in table.tensors.items():
        for part in entry.parts:
            if name.startswith(only):
                wanted.setdefault(part.file, []).append((name, entry, part))
    return wanted


def _listing(folder: Path, table: Manifest, only: str) -> list[Problem]:
    """Files that are missing, too many, or of the wrong size."""
    with files.naming(folder, "list"):
        present = {path.name: path for path in folder.iterdir()}
    problems = []
    needed = {name for name, file in table.files.items() if file.header is None} | set(_by_file(table, only))
    for name in sorted(needed if only else table.files):
        path = present.get(name)
        if path is None:
            problems.append(Problem(str(folder / name), "is missing, but the manifest lists it", _DAMAGED))
            continue
        try:
            facts = path.stat()
        except OSError as error:
            problems.append(files.problem(error, path, "read"))
            continue
        if not stat.S_ISREG(facts.st_mode):
            problems.append(Problem(str(path), "is not a plain file", _DAMAGED))
        elif facts.st_size != table.files[name].bytes:
            what = f"has {facts.st_size:,} bytes, the manifest says {table.files[name].bytes:,}"
            problems.append(Problem(str(path), what, _DAMAGED))
    for name in sorted(present.keys() - table.files.keys() - {manifest.NAME}):
        fix = "move it out of the checkpoint, if you put it there"
        problems.append(Problem(str(present[name]), "is not in the manifest", fix))
    if "trainer.json" not in table.files:
        problems.append(Problem(str(folder / manifest.NAME), "lists no trainer.json", _DAMAGED))
    return problems


def _small(folder: Path, table: Manifest, name: str) -> bytes:
    """Read and check a file that holds no tensors."""
    with files.naming(folder / name, "read"):
        data = (folder / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != table.files[name].sha256:
        raise UserError(Problem(str(folder / name), "does not match its checksum in the manifest", _DAMAGED))
    return data


@contextlib.contextmanager
def _open(path: Path) -> Iterator[int]:
    with files.naming(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _offsets(folder: Path, table: Manifest, name: str, descriptor: int) -> dict[str, tuple[int, int]]:
    """Where the tensors of a file lie, (first byte, end) by key, after checking its header."""
    path, head = folder / name, table.files[name].header
    assert head is not None
    size = os.pread(descriptor, 8, 0)
    if len(size) < 8 or int.from_bytes(size, "little") + 8 != head.bytes or head.bytes > table.files[name].bytes:
        raise UserError(Problem(f"{path} @ byte 0", "its header has another size than the manifest says", _DAMAGED))
    data = memoryview(bytearray(head.bytes))
    if _fill(descriptor, 0, data) != head.sha256:
        raise UserError(Problem(f"{path} @ byte 0", "its header does not match its checksum", _DAMAGED))
    try:
        places = {
            key: (head.bytes + place["data_offsets"][0], head.bytes + place["data_offsets"][1])
            for key, place in json.loads(data[8:].tobytes()).items()
            if key != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(Problem(str(path), f"its header is not that of a safetensors file: {error}", "")) from error
    ends = [head.bytes, *(end for _, end in sorted(places.values()))]
    starts = [*(start for start, _ in sorted(places.values())), table.files[name].bytes]
    if ends != starts:
        raise UserError(Problem(str(path), "its header leaves gaps between tensors or lets them overlap", ""))
    return places


def _fill(descriptor: int, at: int, target: memoryview, digest: hashlib._Hash | None = None) -> str:
    """Read `len(target)` bytes from offset `at` (fewer, if the file ends).

    Returns:
        The SHA-256 of `digest`, if given, and of these bytes after it.
    """
    digest = digest or hashlib.sha256()
    done = 0
    while done < len(target):
        piece = target[done : done + files.PIECE]
        count = os.preadv(descriptor, [piece], at + done)
        if count == 0:
            break
        digest.update(piece[:count])
        done += count
    return digest.hexdigest()


def _tensors(
    folder: Path, table: Manifest, only: str, into: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    """Read the wanted tensors in the order of files and offsets; one in several parts comes when it is complete."""
    into = into or {}
    _refuse(_misfits(folder, table, only, into))
    pending: dict[str, tuple[Tensor, int]] = {}
    for name, places in _by_file(table, only).items():
        with _open(folder / name) as descriptor:
            offsets = _offsets(folder, table, name, descriptor)
            for tensor_name, entry, part in _in_order(folder, name, offsets, places):
                target, missing = pending.pop(tensor_name, (into.get(tensor_name), len(entry.parts)))
                if target is None:
                    target = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
                boxes = Pieces.whole(target.detach()).boxes
                _read_part(folder, descriptor, offsets, (tensor_name, entry, part), boxes)
                if missing > 1:
                    pending[tensor_name] = (target, missing - 1)
                else:
                    yield tensor_name, target


def _misfits(folder: Path, table: Manifest, only: str, into: Mapping[str, Tensor | Pieces]) -> list[Problem]:
    problems = []
    for name, tensor in into.items():
        entry = table.tensors.get(name)
        if entry is None or not name.startswith(only):
            problems.append(Problem(str(folder), f"has no tensor {name!r}", "is it a checkpoint of another model?"))
        elif entry.shape != list(tensor.shape) or DTYPES[entry.dtype] != tensor.dtype:
            what = f"{name!r} is {entry.dtype} {entry.shape} there, but {tensor.dtype} {list(tensor.shape)} is wanted"
            problems.append(Problem(str(folder), what, "is it a checkpoint of another model?"))
    return problems


def _in_order(folder: Path, file: str, offsets: Mapping[str, tuple[int, int]], places: list[_Place]) -> list[_Place]:
    """The places of a file by offset, after checking that header and manifest agree."""
    for name, entry, part in places:
        start, end = offsets.get(manifest.key(name, part), (0, -1))
        if end - start != part_bytes(entry, part):
            raise UserError(Problem(f"{folder / file}: {name}", "header and manifest disagree on its size", _DAMAGED))
    return sorted(places, key=lambda place: offsets[manifest.key(place[0], place[2])])


def _read_part(
    folder: Path,
    descriptor: int,
    offsets: Mapping[str, tuple[int, int]],
    place: _Place,
    boxes: Sequence[Box],
) -> None:
    """Read one part, check it, and copy what it shares with each of some boxes."""
    name, entry, part = place
    at = offsets[manifest.key(name, part)][0]
    direct = _memory_of(part, boxes)
    if direct is not None:
        found = _fill(descriptor, at, raw(direct))
    else:
        digest = hashlib.sha256()
        dtype = DTYPES[entry.dtype]
        position = at
        for inside, size in layout.slabs(part.shape, files.PIECE // dtype.itemsize):
            block = torch.empty(size, dtype=dtype)
            _fill(descriptor, position, raw(block), digest)
            position += block.numel() * dtype.itemsize
            offset = [first + start for first, start in zip(part.offset, inside, strict=True)]
            for view, source in (both for box in boxes if (both := box.overlap(offset, size))):
                view.copy_(block[source])
        found = digest.hexdigest()
    if found != part.sha256:
        where = f"{folder / part.file}: {name} @ byte {at}"
        raise UserError(Problem(where, "does not match its checksum in the manifest", _DAMAGED))


def _memory_of(part: Part, boxes: Sequence[Box]) -> Tensor | None:
    """Where a part belongs as a whole, if that is one stretch of memory that can be read into."""
    both = boxes[0].overlap(part.offset, part.shape) if len(boxes) == 1 else None
    if both is None or list(both[0].shape) != part.shape:
        return None
    view = both[0]
    plain = view.is_contiguous() and view.device.type == "cpu" and not (view.is_conj() or view.is_neg())
    return view if plain else None


def _scan(folder: Path, table: Manifest, name: str, places: list[_Place]) -> None:
    """Check the wanted tensors of one file without keeping them; all damaged ones are named.

    Raises:
        UserError: with a problem for each damaged tensor.
    """
    problems = []
    with _open(folder / name) as descriptor:
        offsets = _offsets(folder, table, name, descriptor)
        for tensor_name, _, part in _in_order(folder, name, offsets, places):
            at, end = offsets[manifest.key(tensor_name, part)]
            if _digest(descriptor, at, end) != part.sha256:
                where = f"{folder / name}: {tensor_name} @ byte {at}"
                problems.append(Problem(where, "does not match its checksum in the manifest", _DAMAGED))
    _refuse(problems)


def _digest(descriptor: int, at: int, end: int) -> str:
    """SHA-256 of a stretch of a file, read through a small buffer."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(files.PIECE))
    while at < end:
        count = os.preadv(descriptor, [buffer[: min(len(buffer), end - at)]], at)
        if count == 0:
            break
        digest.update(buffer[:count])
        at += count
    return digest.hexdigest()
