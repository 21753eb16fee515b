"""Reads the members of one shard where they lie, and believes none of them before it has been checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import tarfile
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tozan.data.manifest import Manifest, ShardEntry
from tozan.data.shards import BLOCK, Facts, key, padding
from tozan.errors import Problem, UserError

Array = npt.NDArray[Any]

GOOD, BAD = 1, 2
"""Verdicts on members."""
LONGEST_DESCRIPTION = 1 << 20
"""Largest description of a document, in bytes."""
REBUILD = "copy it again from where it is whole, or build the data set again"


class DamagedError(UserError):
    """A shard, an index or a member that does not hold what the data set says it holds."""


def damaged(where: str, what: str, fix: str = REBUILD) -> DamagedError:
    """One problem, ready to be raised."""
    return DamagedError(Problem(where, what, fix))


def check_size(path: Path, size: int) -> None:
    """Looks whether a file is there, is a regular file, and has the right length.

    Raises:
        DamagedError: it is missing, something else, truncated or too long.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise damaged(str(path), f"cannot be read: {error.strerror}") from None
    if not path.is_file() or path.is_symlink():
        raise damaged(str(path), "is not a regular file")
    if status.st_size != size:
        how = "truncated" if status.st_size < size else "too long"
        raise damaged(str(path), f"is {how}: {status.st_size:,} bytes, the manifest says {size:,}")


class Index:
    """A shard's index, mapped into memory: where the tokens of each document lie.

    Attributes:
        start: (documents + 1,) u64, positions in the shard's stream of tokens.
        offset: (documents,) u64, where each payload begins in the tar.
        crc: (documents,) u32, checksums of the payloads.
        bytes: (documents,) u32, lengths of the texts.
    """

    def __init__(self, folder: Path, entry: ShardEntry, manifest: Manifest) -> None:
        """Maps and checks an index.

        Raises:
            DamagedError: it is missing, damaged, of another shard, or made with another tokenizer.
        """
        path = folder / entry.index
        check_size(path, entry.index_size)
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise damaged(str(path), f"cannot be read: {error}") from None
        columns, stated = _columns(path, data)
        expected = Facts(entry.name, manifest.tokenizer_sha256, manifest.dtype, manifest.vocabulary)
        for field, value in vars(expected).items():
            if (found := stated.get(field)) != value:
                fix = "use shards that were built together" if field != "shard" else REBUILD
                raise damaged(str(path), f"belongs to {field} {found}, the manifest says {value}", fix)
        if (found := hashlib.sha256(data).hexdigest()) != entry.index_sha256:
            raise damaged(str(path), f"is damaged: its SHA-256 is {found[:12]}…, not {entry.index_sha256[:12]}…")
        self.start, self.offset = columns["start"], columns["offset"]
        self.crc, self.bytes = columns["crc"], columns["bytes"]
        self._check(path, entry, np.dtype(manifest.dtype).itemsize)

    def _check(self, path: Path, entry: ShardEntry, width: int) -> None:
        """Holds the columns against each other and against the manifest, so that no read can leave the tar."""
        documents = entry.documents
        shapes = [len(self.start) - 1, len(self.offset), len(self.crc), len(self.bytes)]
        if shapes != [documents] * 4:
            raise damaged(str(path), f"has columns for {shapes} documents, the manifest says {documents}")
        start = self.start.astype(np.int64)
        lengths = np.diff(start) - 1
        if start[0] != 0 or start[-1] != entry.tokens or (lengths < 0).any():
            raise damaged(str(path), f"does not add up to the {entry.tokens:,} tokens of the manifest")
        ends = self.offset.astype(np.int64) + lengths * width
        if (self.offset < BLOCK).any() or (ends < 0).any() or (ends > entry.size).any():
            raise damaged(str(path), f"points outside its shard of {entry.size:,} bytes")


def _columns(path: Path, data: mmap.mmap) -> tuple[dict[str, Array], dict[str, Any]]:
    """Views of the arrays in a mapped safetensors file, and our own metadata."""
    try:
        length = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + length])
        facts = json.loads(head["__metadata__"]["tozan"])
        columns = {}
        for name, dtype in (("start", "<u8"), ("offset", "<u8"), ("crc", "<u4"), ("bytes", "<u4")):
            begin, end = head[name]["data_offsets"]
            count = (end - begin) // np.dtype(dtype).itemsize
            columns[name] = np.frombuffer(data, dtype=dtype, count=count, offset=8 + length + begin)
        return columns, dict(facts)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise damaged(str(path), f"is no index of a shard: {error}") from None


class Shard:
    """An open shard. Safe to use from several threads: reads name their offset, and nothing is cached but verdicts."""

    def __init__(self, folder: Path, entry: ShardEntry, manifest: Manifest, checked: bytearray) -> None:
        """Opens the tar and its index.

        Args:
            folder: the data set.
            entry: the shard.
            manifest: the data set's manifest.
            checked: one byte a document: 0, or whether its member was found `GOOD` or `BAD` when first read.

        Raises:
            DamagedError: the tar or its index is not what the manifest says.
        """
        self._path = folder / entry.name
        check_size(self._path, entry.size)
        self.index = Index(folder, entry, manifest)
        self._stem = entry.name.removesuffix(".tar")
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._vocabulary = manifest.vocabulary
        self._checked = checked
        try:
            self._handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise damaged(str(self._path), f"cannot be read: {error.strerror}") from None
        # Closed when the last user lets go, as another thread may be reading while this shard leaves the cache.
        self._finalizer = weakref.finalize(self, os.close, self._handle)

    def tokens(self, document: int, first: int, last: int) -> Array:
        """Some tokens of a document.

        Args:
            document: its number in the shard.
            first: first token wanted.
            last: one past the last token wanted.

        Returns:
            (last - first,) tokens as they are stored.

        Raises:
            DamagedError: the member is not whole. Its header, checksum and tokens are looked at when it is first read.
        """
        width = self._dtype.itemsize
        if self._checked[document] == BAD:
            raise damaged(self.where(document), "is damaged, as was found before")
        if self._checked[document] != GOOD:
            try:
                tokens = self._whole(document)
            except DamagedError:
                self._checked[document] = BAD
                raise
            self._checked[document] = GOOD
            return tokens[first:last]
        offset = int(self.index.offset[document]) + first * width
        data = self._read(document, offset, (last - first) * width)
        return np.frombuffer(data, dtype=self._dtype)

    def _whole(self, document: int) -> Array:
        """Reads and checks a member: the header before the payload, the payload's checksum, and each token."""
        begin = int(self.index.offset[document]) - BLOCK
        size = (int(self.index.start[document + 1]) - int(self.index.start[document]) - 1) * self._dtype.itemsize
        data = self._read(document, begin, BLOCK + size)
        if wrong := wrong_header(data[:BLOCK], f"{key(self._stem, document)}.tokens", size):
            raise damaged(self.where(document), wrong)
        payload = memoryview(data)[BLOCK:]
        if (found := zlib.crc32(payload)) != (stated := int(self.index.crc[document])):
            raise damaged(
                self.where(document), f"the payload is damaged: CRC-32 {found:08x}, the index says {stated:08x}"
            )
        tokens = np.frombuffer(payload, dtype=self._dtype)
        if len(tokens) and (largest := int(tokens.max())) >= self._vocabulary:
            at = int(tokens.argmax())
            rule = f"token {at:,} is {largest:,}, beyond the vocabulary of {self._vocabulary:,}"
            raise damaged(self.where(document), rule, "build the data set again with its own tokenizer")
        return tokens

    def _read(self, document: int, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._handle, size, offset)
            while len(data) < size and (more := os.pread(self._handle, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise damaged(self.where(document), f"cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise damaged(self.where(document), f"is truncated: {len(data):,} of {size:,} bytes are there")
        return data

    def about(self, document: int) -> dict[str, Any]:
        """What the member beside the tokens says about a document: name, source, licence, bytes.

        Raises:
            DamagedError: that member is not whole.
        """
        begin, size = self._description(document)
        with contextlib.suppress(ValueError):
            return dict(json.loads(self._read(document, begin + BLOCK, size)))
        raise damaged(self._where_description(document, begin), "the document's description is damaged")

    def end(self, document: int) -> int:
        """Where the second member of a document ends in the tar, with its padding."""
        begin, size = self._description(document)
        return begin + BLOCK + size + padding(size)

    def _description(self, document: int) -> tuple[int, int]:
        """Offset of the header of a document's second member, and the size that header states, if all is well."""
        size = (int(self.index.start[document + 1]) - int(self.index.start[document]) - 1) * self._dtype.itemsize
        begin = int(self.index.offset[document]) + size + padding(size)
        where = self._where_description(document, begin)
        try:
            member = tarfile.TarInfo.frombuf(self._read(document, begin, BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise damaged(where, f"the tar header is damaged: {error}") from None
        name = f"{key(self._stem, document)}.json"
        if (wrong := unsafe(member)) or member.name != name:
            raise damaged(where, wrong or f"the member is called {member.name!r}, not {name!r}")
        if member.size > LONGEST_DESCRIPTION:
            raise damaged(where, f"states {member.size:,} bytes; a description has at most {LONGEST_DESCRIPTION:,}")
        return begin, member.size

    def _where_description(self, document: int, begin: int) -> str:
        return f"{self._path}:{key(self._stem, document)}.json @ {begin}"

    def where(self, document: int) -> str:
        """How a member is named to the user: shard, member, and the offset of its header."""
        offset = int(self.index.offset[document]) - BLOCK
        return f"{self._path}:{key(self._stem, document)}.tokens @ {offset}"


def wrong_header(block: bytes, name: str, size: int) -> str:
    """What is wrong with a member's tar header; nothing if it is a regular file of this name and size."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"the tar header is damaged: {error}"
    if (kind := unsafe(member)) or member.name != name:
        return kind or f"the member is called {member.name!r}, not {name!r}"
    if member.size != size:
        return f"the member has {member.size:,} bytes, the index says {size:,}"
    return ""


def unsafe(member: tarfile.TarInfo) -> str:
    """Why a member has no business in a shard: a link, a device, or a name that leaves the folder."""
    kinds = {
        tarfile.SYMTYPE: "a symbolic link",
        tarfile.LNKTYPE: "a hard link",
        tarfile.CHRTYPE: "a character device",
        tarfile.BLKTYPE: "a block device",
        tarfile.FIFOTYPE: "a pipe",
        tarfile.DIRTYPE: "a folder",
    }
    if not member.isreg():
        return f"the member {member.name!r} is {kinds.get(member.type, f'of type {member.type!r}')}, not a file"
    if member.name.startswith("/"):
        return f"the member's name {member.name!r} is absolute"
    if ".." in member.name.split("/"):
        return f"the member's name {member.name!r} leaves the folder"
    return ""
