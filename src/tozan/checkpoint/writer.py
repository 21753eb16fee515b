"""Saving: staged, checksummed, synced, and only then renamed to its real name."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tozan import files
from tozan.checkpoint import folders, manifest
from tozan.checkpoint.manifest import Entry, File, Header, Manifest, Part
from tozan.checkpoint.state import DTYPE_NAMES, State, check, combine, pieces

MAX_FILE_BYTES = 4 << 30
"""Tensors are spread over files of about this size."""


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
    return write(root, state, trainer, max_file_bytes)


def write(root: Path, state: State, trainer: bytes, max_file_bytes: int) -> Path:
    """Write a checked state under an existing root.

    Args:
        root: the folder of checkpoints.
        state: what to save.
        trainer: `trainer.json`, as `check(state)` returned it.
        max_file_bytes: start another file when one would grow beyond this.

    Raises:
        UserError: the file system refused.
    """
    final = folders.path_of(root, state.step)
    staged, descriptor = folders.stage(root, state.step)
    try:
        try:
            _fill(staged, state, trainer, max_file_bytes)
        except BaseException:
            folders.delete(staged)
            raise
        folders.publish(staged, final)
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return final


def _fill(staged: Path, state: State, trainer: bytes, max_file_bytes: int) -> None:
    """Write and sync all files of a checkpoint, the manifest last."""
    table: dict[str, File] = {}
    entries: dict[str, Entry] = {}
    for name, data in sorted({**state.files, "trainer.json": trainer}.items()):
        with files.create(staged / name) as out:
            out.write(data)
        table[name] = File(bytes=out.bytes, sha256=out.sha256.hexdigest())
    for name, names in plan(state.tensors, max_file_bytes).items():
        table[name], written = write_tensors(staged / name, {each: state.tensors[each] for each in names})
        entries.update(written)
    whole = combine((name, e.dtype, tuple(e.shape), e.parts[0].sha256) for name, e in entries.items())
    complete = Manifest(
        format="tozan checkpoint", version=1, step=state.step, state=whole, files=table, tensors=entries
    )
    with files.create(staged / manifest.NAME) as out:
        out.write(manifest.encode(complete))
    files.sync_folder(staged)


def plan(tensors: Mapping[str, Tensor], max_file_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which file: one group after the other, each file filled up to the limit.

    Wide elements come first within a file, so that every tensor is aligned to its element (safetensors' own order).
    """
    groups: dict[str, list[list[str]]] = {}
    room: dict[str, int] = {}
    for name in sorted(tensors, key=lambda n: (n.partition("/")[0], -tensors[n].element_size(), n)):
        group, size = name.partition("/")[0], _bytes(tensors[name])
        if group not in groups or size > room[group]:
            groups.setdefault(group, []).append([])
            room[group] = max_file_bytes
        groups[group][-1].append(name)
        room[group] -= size
    return {
        f"{group}-{number:05d}-of-{len(volumes):05d}.safetensors": names
        for group, volumes in groups.items()
        for number, names in enumerate(volumes, 1)
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[File, dict[str, Entry]]:
    """Write one safetensors file, hashing each tensor and the file in one pass over memory.

    Raises:
        UserError: the file system refused.
    """
    file_name = path.name
    entries: dict[str, Entry] = {}
    with files.create(path) as out:
        header = _header(tensors)
        out.write(header)
        for name, tensor in tensors.items():
            digest = hashlib.sha256()
            for piece in pieces(tensor):
                digest.update(piece)
                out.write(piece)
            shape = list(tensor.shape)
            part = Part(file=file_name, offset=[0] * len(shape), shape=shape, sha256=digest.hexdigest())
            entries[name] = Entry(dtype=DTYPE_NAMES[tensor.dtype], shape=shape, parts=[part])
    head = Header(bytes=len(header), sha256=hashlib.sha256(header).hexdigest())
    return File(bytes=out.bytes, sha256=out.sha256.hexdigest(), header=head), entries


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The head of a safetensors file: length of the JSON (u64, little endian), JSON, spaces up to 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        end = at + _bytes(tensor)
        table[manifest.key(name)] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
