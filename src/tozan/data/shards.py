"""The layout of a shard: a tar of `<key>.tokens` and `<key>.json` pairs, and an index beside it.

Both the writer and the readers take the layout from here. A shard is an ordinary POSIX tar (ustar) that `tar tf` and
webdataset read; its index is a safetensors file that says where each member's payload lies, so that training needs
neither to walk the tar nor to extract it:

    start   (documents + 1,) u64   position of each document in the shard's stream of tokens; the last is its length
    offset  (documents,)     u64   where the tokens begin in the tar, in bytes
    crc     (documents,)     u32   CRC-32 of the tokens' bytes
    bytes   (documents,)     u32   length of the document's text in UTF-8

Nothing in either file depends on the clock, the user or the machine: equal input gives equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as to_safetensors

from tozan.data.document import Document
from tozan.data.manifest import ShardEntry, Split

BLOCK = 512
"""Tar's unit: headers are one block, payloads are padded to whole blocks."""
RECORD = 20 * BLOCK
"""A tar ends with at least two zero blocks, filled up to this."""


def stem(split: str, number: int) -> str:
    """Name of a shard without its suffix, such as `train-00003`."""
    return f"{split}-{number:05d}"


def key(shard: str, document: int) -> str:
    """What a document's members are called before their suffix: the shard's stem and the document's number in it."""
    return f"{shard}-{document:07d}"


def header(name: str, size: int) -> bytes:
    """The tar header of a regular file with neither owner nor date."""
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int) -> int:
    """Bytes from the end of a payload to the next block."""
    return -size % BLOCK


@dataclass(frozen=True)
class Facts:
    """What an index says about the data set it belongs to, so that a stray one is recognised.

    Attributes:
        shard: name of the tar file.
        tokenizer_sha256: hash of the tokenizer that made the tokens.
        dtype: `uint16` or `uint32`.
        vocabulary: every token is below this.
    """

    shard: str
    tokenizer_sha256: str
    dtype: str
    vocabulary: int

    def to_metadata(self) -> dict[str, str]:
        """For the header of a safetensors file: one entry, as the order of several is not kept."""
        return {"tozan": json.dumps(vars(self), sort_keys=True)}


class _File:
    """A file that hashes what is written to it and is on disk once closed."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("xb")
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def write_file(path: Path, data: bytes) -> str:
    """Writes a new file durably.

    Returns:
        Its SHA-256.
    """
    file = _File(path)
    file.write(data)
    file.close()
    return file.hash.hexdigest()


class ShardWriter:
    """Writes one shard and its index into a folder; `finish` returns what the manifest says about them."""

    def __init__(self, folder: Path, split: Split, number: int, facts: dict[str, Any]) -> None:
        """Begins a shard.

        Args:
            folder: where to write.
            split: the split the shard belongs to.
            number: its place in the split.
            facts: the fields of `Facts` other than `shard`.
        """
        self.stem = stem(split, number)
        self.split: Split = split
        self.facts = Facts(shard=f"{self.stem}.tar", **facts)
        self._folder = folder
        self._dtype: npt.DTypeLike = np.dtype(self.facts.dtype).newbyteorder("<")
        self._tar = _File(folder / self.facts.shard)
        self._start, self._offset = array("Q", [0]), array("Q")
        self._crc, self._bytes = array("I"), array("I")

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._tar.size

    def add(self, document: Document, tokens: npt.NDArray[np.uint32]) -> None:
        """Appends a document: its tokens, then what is known about it."""
        payload = tokens.astype(self._dtype).tobytes()
        size = len(document.text.encode())
        about = {"bytes": size, "licence": document.licence, "name": document.name, "source": document.source}
        name = key(self.stem, len(self._offset))
        self._offset.append(self._tar.size + BLOCK)
        self._crc.append(zlib.crc32(payload))
        self._bytes.append(size)
        self._start.append(self._start[-1] + len(tokens) + 1)
        self._member(f"{name}.tokens", payload)
        self._member(f"{name}.json", json.dumps(about, ensure_ascii=False).encode())

    def _member(self, name: str, payload: bytes) -> None:
        self._tar.write(header(name, len(payload)) + payload + bytes(padding(len(payload))))

    def finish(self) -> ShardEntry:
        """Closes the tar, writes the index, and returns the shard's entry for the manifest."""
        end = self._tar.size + 2 * BLOCK
        self._tar.write(bytes(2 * BLOCK + -end % RECORD))
        self._tar.close()
        columns: dict[str, npt.NDArray[Any]] = {
            "start": np.array(self._start, dtype=np.uint64),
            "offset": np.array(self._offset, dtype=np.uint64),
            "crc": np.array(self._crc, dtype=np.uint32),
            "bytes": np.array(self._bytes, dtype=np.uint32),
        }
        index = to_safetensors(columns, metadata=self.facts.to_metadata())
        name = f"{self.stem}.index.safetensors"
        return ShardEntry(
            name=self.facts.shard,
            split=self.split,
            documents=len(self._offset),
            bytes=sum(self._bytes),
            tokens=self._start[-1],
            size=self._tar.size,
            sha256=self._tar.hash.hexdigest(),
            index=name,
            index_size=len(index),
            index_sha256=write_file(self._folder / name, index),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.file.close()
