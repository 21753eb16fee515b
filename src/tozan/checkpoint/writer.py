"""Saving: staged, checksummed, synced, and only then renamed to its real name; by one process or by many.

Every rank writes its boxes into files of its own in one staging folder and tells rank 0 what they hold. When all have
told, rank 0 writes the manifest and renames the folder; if one has failed, it deletes the folder instead. The folder
lies on a file system that all ranks share.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from tozan import files
from tozan.checkpoint import crew as crews
from tozan.checkpoint import fingerprint, folders, manifest
from tozan.checkpoint.crew import Alone, Crew
from tozan.checkpoint.manifest import Entry, File, Header, Manifest, Part
from tozan.checkpoint.state import DTYPE_NAMES, Box, Pieces, State, blocks, check, combine, raw
from tozan.errors import Problem, UserError

MAX_FILE_BYTES = 4 << 30
"""Tensors are spread over files of about this size."""


class Report(BaseModel):
    """What one rank has written: its files and its parts of tensors, or what kept it from it."""

    files: dict[str, File] = {}
    tensors: dict[str, Entry] = {}
    problems: list[tuple[str, str, str]] = []


@dataclass(frozen=True)
class Item:
    """A box on its way into a file.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        box: what is written of it.
    """

    name: str
    shape: tuple[int, ...]
    box: Box

    @property
    def key(self) -> str:
        """What it is called in its file."""
        size = self.box.tensor.shape
        whole = tuple(size) == self.shape
        return manifest.key(self.name) if whole else manifest.box_key(self.name, self.box.offset, size)

    @property
    def bytes(self) -> int:
        """Bytes of the box."""
        return self.box.tensor.numel() * self.box.tensor.element_size()


def save(root: Path, state: State, *, max_file_bytes: int = MAX_FILE_BYTES) -> Path:
    """Write a checkpoint; after a crash at any moment a reader finds the old state or the new, never a mix.

    Args:
        root: the folder of checkpoints; made if it is missing.
        state: what to save.
        max_file_bytes: start another file when one would grow beyond this.

    Returns:
        The checkpoint's folder, `root/step-00000100`.

    Raises:
        UserError: the file system refused (full, read-only, gone, ...): names the file. Older checkpoints are as
            they were, and so is an older one of the same step.
        ValueError: the state has names or numbers that the format does not carry.
        TypeError: the state has tensors or meta that the format does not carry.
    """
    trainer = check(state)
    with files.naming(root, "make"):
        root.mkdir(parents=True, exist_ok=True)
    files.sync_folder(root.parent)
    staged, descriptor = folders.stage(root, state.step)
    try:
        write(staged, state, trainer, Alone(), max_file_bytes)
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return folders.path_of(root, state.step)


def write(staged: Path, state: State, trainer: bytes, crew: Crew, max_file_bytes: int) -> None:
    """This rank's part in a save; on rank 0 also all that follows when the others have done theirs.

    Rank 0 waits for every rank, also after an error: nobody may write into a folder that is being deleted. A rank that
    dies before it has told breaks up the crew or ends the whole job (`comm.monitor`), so no time limit is needed here;
    the folder is then swept at the next start.

    Args:
        staged: the folder that all ranks write into; rank 0 has made it.
        state: checked.
        trainer: `trainer.json`, as `check(state)` returned it.
        crew: the ranks.
        max_file_bytes: start another file when one would grow beyond this.

    Raises:
        UserError: on rank 0, naming the rank if there are several: the file system refused.
        Broken: on rank 0: a rank is gone.
    """
    own: BaseException | None = None
    try:
        report = _fill(staged, state, trainer, crew, max_file_bytes)
    except BaseException as error:
        own, report = error, Report(problems=_with_rank(crew, error))
    crew.tell(staged.name, report.model_dump_json())
    if crew.rank == 0:
        reports = [Report.model_validate_json(text) for text in crew.hear(staged.name)]
        try:
            if own is not None and (crew.size == 1 or not isinstance(own, UserError)):
                raise own
            found = [Problem(*each) for one in reports for each in one.problems]
            if found:
                raise UserError(*found)
            _finish(staged, state.step, reports)
        except BaseException:
            folders.delete(staged)
            raise
        folders.publish(staged, folders.path_of(staged.parent, state.step))
    elif own is not None and not isinstance(own, UserError):
        raise own


def _with_rank(crew: Crew, error: BaseException) -> list[tuple[str, str, str]]:
    """An error as rank 0 hears of it; which rank it was matters where there are several."""
    found = crews.told(crew.rank, error)
    if crew.size == 1 or not isinstance(error, UserError):
        return found
    return [(f"rank {crew.rank}: {where}", what, fix) for where, what, fix in found]


def _fill(staged: Path, state: State, trainer: bytes, crew: Crew, max_file_bytes: int) -> Report:
    """Write and sync this rank's files of a checkpoint; the small ones are rank 0's."""
    report = Report()
    small = {**state.files, "trainer.json": trainer} if crew.rank == 0 else {}
    for name, data in sorted(small.items()):
        with files.create(staged / name) as out:
            out.write(data)
        report.files[name] = File(bytes=out.bytes, sha256=out.sha256.hexdigest())
    prefix = f"rank{crew.rank:06d}-" if crew.size > 1 else ""
    for name, items in plan(state.held(), max_file_bytes, prefix).items():
        report.files[name], written = write_items(staged / name, items)
        for tensor_name, entry in written:
            _add(report.tensors, tensor_name, entry)
    return report


def _add(table: dict[str, Entry], name: str, entry: Entry) -> None:
    """Put parts of a tensor to those that are there."""
    known = table.get(name)
    if known is not None:
        assert (known.dtype, known.shape) == (entry.dtype, entry.shape), name
        total = fingerprint.text(fingerprint.parse(known.sum or "") + fingerprint.parse(entry.sum or ""))
        entry = entry.model_copy(update={"parts": [*known.parts, *entry.parts], "sum": total})
    table[name] = entry


def _finish(staged: Path, step: int, reports: Sequence[Report]) -> None:
    """Write the manifest of what all ranks have written, and sync the folder."""
    table = {name: file for report in reports for name, file in report.files.items()}
    entries: dict[str, Entry] = {}
    for report in reports:
        for name, entry in report.tensors.items():
            _add(entries, name, entry)
    whole = combine((name, e.dtype, e.shape, e.sum or "") for name, e in entries.items())
    complete = Manifest(
        format="tozan checkpoint", version=2, step=step, state=whole, files=table, tensors=dict(sorted(entries.items()))
    )
    wrong = manifest.contradictions(complete)
    if wrong:
        raise RuntimeError(f"the ranks' parts do not fit together: {'; '.join(wrong[:3])}")
    with files.create(staged / manifest.NAME) as out:
        out.write(manifest.encode(complete))
    files.sync_folder(staged)


def plan(held: Mapping[str, Pieces], max_file_bytes: int, prefix: str = "") -> dict[str, list[Item]]:
    """Which boxes go into which file: one group after the other, each file filled up to the limit.

    Wide elements come first within a file, so that every box is aligned to its element (safetensors' own order).
    """
    groups: dict[str, list[list[Item]]] = {}
    room: dict[str, int] = {}
    for name in sorted(held, key=lambda n: (n.partition("/")[0], -held[n].dtype.itemsize, n)):
        group = name.partition("/")[0]
        for item in (Item(name, held[name].shape, box) for box in held[name].boxes):
            if group not in groups or item.bytes > room[group]:
                groups.setdefault(group, []).append([])
                room[group] = max_file_bytes
            groups[group][-1].append(item)
            room[group] -= item.bytes
    return {
        f"{group}-{prefix}{number:05d}-of-{len(volumes):05d}.safetensors": items
        for group, volumes in groups.items()
        for number, items in enumerate(volumes, 1)
    }


def write_items(path: Path, items: Sequence[Item]) -> tuple[File, list[tuple[str, Entry]]]:
    """Write one safetensors file; each block is hashed, added up and written while it is in the cache.

    Returns:
        What the manifest says about the file, and about each item by the name of its tensor.

    Raises:
        UserError: the file system refused.
    """
    written = []
    with files.create(path, hashed=False) as out:
        header = _header(items)
        out.write(header)
        for item in items:
            digest, total, tensor = hashlib.sha256(), fingerprint.zero(), item.box.tensor
            for block in blocks(item.box):
                data = raw(block.tensor)
                digest.update(data)
                total += fingerprint.of(block.tensor, block.offset)
                out.write(data)
            key = None if item.key == manifest.key(item.name) else item.key
            shape, offset = list(tensor.shape), list(item.box.offset)
            part = Part(file=path.name, key=key, offset=offset, shape=shape, sha256=digest.hexdigest())
            entry = Entry(
                dtype=DTYPE_NAMES[tensor.dtype], shape=list(item.shape), parts=[part], sum=fingerprint.text(total)
            )
            written.append((item.name, entry))
    head = Header(bytes=len(header), sha256=hashlib.sha256(header).hexdigest())
    return File(bytes=out.bytes, header=head), written


def _header(items: Iterable[Item]) -> bytes:
    """The head of a safetensors file: length of the JSON (u64, little endian), JSON, spaces up to 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for item in items:
        tensor, end = item.box.tensor, at + item.bytes
        table[item.key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
