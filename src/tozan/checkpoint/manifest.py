"""The manifest: what a checkpoint's files and tensors are, bound to their checksums. Torch-free."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tozan import files
from tozan.errors import Problem, UserError
from tozan.files import naming

NAME = "manifest.json"
VERSION = 2
"""What is written. Version 1 (one writer; `state` from SHA-256 of whole tensors; every file hashed) is still read."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Size = Annotated[int, Field(ge=0, lt=1 << 63)]

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes of an element, by the safetensors format's name of its type."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Header(_Entry):
    """The first bytes of a safetensors file: its length field, its JSON and the padding."""

    bytes: Size
    sha256: Sha256


class File(_Entry):
    """One file of the checkpoint."""

    bytes: Size
    sha256: Sha256 | None = None
    """Of files that hold no tensors. Header and parts of the others have their own, which cover every byte once."""
    header: Header | None = None
    """Only for safetensors files."""


class Part(_Entry):
    """A box of a global tensor, stored in one file."""

    file: FileName
    key: str | None = None
    """Its name in the file; None for a whole tensor, which goes by its own name without the group."""
    offset: list[Size]
    """Where the box starts in the global tensor, one number per dim."""
    shape: list[Size]
    sha256: Sha256
    """Of the box's bytes in row-major order."""


class Entry(_Entry):
    """One global tensor."""

    dtype: str
    """As the safetensors format names it: F32, BF16, ..."""
    shape: list[Size]
    parts: Annotated[list[Part], Field(min_length=1)]
    """Boxes that together hold each element once: one, the whole, or those that the ranks have written."""
    sum: Fingerprint | None = None
    """What `fingerprint` makes of all elements; None in version 1."""


class Manifest(_Entry):
    """What is in one checkpoint folder."""

    format: Literal["tozan checkpoint"]
    version: Literal[1, 2]
    step: Size
    state: Sha256 | None
    """The state hash of all tensors (of version 1: another hash, if each tensor is in one part)."""
    files: dict[FileName, File]
    tensors: dict[str, Entry]


def key(name: str, part: Part | None = None) -> str:
    """What a part is called in its file: a whole tensor by its name without the group, as other tools expect."""
    return (part and part.key) or name.partition("/")[2]


def box_key(name: str, offset: Sequence[int], shape: Sequence[int]) -> str:
    """What a box that is not the whole tensor is called in its file: `mlp.fc.weight[0:64,0:128]`."""
    ranges = ",".join(f"{at}:{at + size}" for at, size in zip(offset, shape, strict=True))
    return f"{key(name)}[{ranges}]"


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: its last line but one carries the SHA-256 of all that stands before it."""
    text = json.dumps(manifest.model_dump(), indent=1, ensure_ascii=True)
    body = text.removesuffix("\n}") + ",\n"
    return (body + _tail(body.encode())).encode()


def read(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint.

    Raises:
        UserError: it is missing, damaged, edited, of another version, or contradicts itself.
    """
    path = folder / NAME
    with naming(path, "read"):
        data = files.read(path)
    body, mark, _ = data.rpartition(b' "checksum": ')
    if not mark or data != body + _tail(body).encode():
        fix = "it was cut off, damaged or edited: use another checkpoint"
        raise UserError(Problem(str(path), "does not match its own checksum", fix))
    try:
        table = json.loads(data)
        del table["checksum"]
        version = table.get("version")
        if table.get("format") == "tozan checkpoint" and version not in range(1, VERSION + 1):
            what = f"has format version {version!r}, this tozan reads 1 to {VERSION}"
            raise UserError(Problem(str(path), what, "use a newer tozan"))
        manifest = Manifest.model_validate(table)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(Problem(str(path), f"is no manifest of a checkpoint: {_first_line(error)}")) from error
    problems = [Problem(str(path), what) for what in contradictions(manifest)]
    if problems:
        raise UserError(*problems)
    return manifest


def contradictions(manifest: Manifest) -> list[str]:
    """What a manifest says that cannot be, so that a reader may trust its numbers."""
    found = [
        f"file {name!r} has no checksum" for name, f in manifest.files.items() if f.sha256 is None and f.header is None
    ]
    for name, entry in manifest.tensors.items():
        if "/" not in name:
            found.append(f"tensor {name!r} has no group")
        if entry.dtype not in ITEM_BYTES:
            found.append(f"tensor {name!r} has unknown dtype {entry.dtype!r}")
            continue
        if math.prod(max(size, 1) for size in entry.shape) >= 1 << 60:
            found.append(f"tensor {name!r} has an impossible shape {entry.shape}")
        for part in entry.parts:
            file = manifest.files.get(part.file)
            if file is None or file.header is None:
                found.append(f"tensor {name!r} is said to be in {part.file!r}, which is no tensor file of the manifest")
            elif part_bytes(entry, part) > file.bytes:
                found.append(f"tensor {name!r} is larger than its file {part.file!r}")
        if not _tiles(entry):
            found.append(f"the parts of tensor {name!r} do not make up its shape {entry.shape}")
    return found


def part_bytes(entry: Entry, part: Part) -> int:
    """Bytes of one part of a tensor."""
    return math.prod(part.shape) * ITEM_BYTES[entry.dtype]


def _tiles(entry: Entry) -> bool:
    """Whether the parts lie inside the tensor, do not overlap, and hold all of its elements."""
    if any(len(box.offset) != len(entry.shape) or len(box.shape) != len(entry.shape) for box in entry.parts):
        return False
    boxes = [list(zip(box.offset, box.shape, strict=True)) for box in entry.parts]
    inside = all(at + size <= whole for box in boxes for (at, size), whole in zip(box, entry.shape, strict=True))
    return inside and not _overlap(boxes) and sum(math.prod(p.shape) for p in entry.parts) == math.prod(entry.shape)


def _overlap(boxes: list[list[tuple[int, int]]]) -> bool:
    """Whether any two boxes, as (start, size) by dim, share an element; sorted, so only near ones are compared."""
    near: list[list[tuple[int, int]]] = []
    for box in sorted(boxes):
        near = [other for other in near if not box or sum(other[0]) > box[0][0]]
        if any(all(a < b + m and b < a + n for (a, n), (b, m) in zip(box, other, strict=True)) for other in near):
            return True
        near.append(box)
    return False


def _tail(body: bytes) -> str:
    return f' "checksum": "{hashlib.sha256(body).hexdigest()}"\n}}\n'


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).partition("\n")[0]
