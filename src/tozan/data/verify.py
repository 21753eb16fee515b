"""Reads a whole data set and says all that is wrong with it."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tozan.data import manifest as layout
from tozan.data.manifest import Manifest, ShardEntry
from tozan.data.reader import REBUILD, DamagedError, Shard, check_size, unsafe
from tozan.data.shards import BLOCK, key, padding
from tozan.data.tokenizer import Tokenizer
from tozan.errors import Problem, UserError

NAMED = 50
"""Damaged members named one by one in a shard; of more, only the number is told."""
ABSURD = 1 << 30
"""No member that we write is larger; a header that says so is damaged or hostile."""


def verify(path: Path | str) -> list[Problem]:
    """Checks every file of a data set: hashes, tar headers, payloads, tokens and descriptions.

    Args:
        path: folder written by `build`.

    Returns:
        Everything that is wrong, each with its shard, member and offset; nothing if all is well.
    """
    path = Path(path)
    try:
        manifest = Manifest.read(path)
    except UserError as error:
        return error.problems
    problems = []
    try:
        check_tokenizer(path, manifest)
    except UserError as error:
        problems += error.problems
    for entry in manifest.shards:
        problems += check_shard(path, entry, manifest)
    return problems


def check_tokenizer(path: Path, manifest: Manifest) -> bytes:
    """Returns the data set's tokenizer, whose hash must be the manifest's.

    Raises:
        UserError: it is missing, damaged, or another one.
    """
    file = path / layout.TOKENIZER
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DamagedError(Problem(str(file), f"cannot be read: {error.strerror}", REBUILD)) from None
    if (found := hashlib.sha256(data).hexdigest()) != manifest.tokenizer_sha256:
        rule = f"is damaged or another tokenizer's: SHA-256 {found[:12]}…"
        raise DamagedError(Problem(str(file), f"{rule}, the manifest says {manifest.tokenizer_sha256[:12]}…", REBUILD))
    return Tokenizer.load(data).json


def check_lengths(path: Path, entry: ShardEntry, _: Manifest) -> list[Problem]:
    """What is wrong with a shard and its index as far as their lengths tell, which costs next to nothing."""
    problems = []
    for name, size in ((entry.name, entry.size), (entry.index, entry.index_size)):
        try:
            check_size(path / name, size)
        except DamagedError as error:
            problems += error.problems
    return problems


def check_shard(path: Path, entry: ShardEntry, manifest: Manifest) -> list[Problem]:
    """All that is wrong with one shard and its index."""
    tar = path / entry.name
    problems: list[Problem] = []
    try:
        shard = Shard(path, entry, manifest, bytearray(entry.documents))
    except DamagedError as error:
        problems += error.problems
        found = _walk(tar) if tar.is_file() and not tar.is_symlink() else iter(())
    else:
        found = _members(shard, tar, entry)
    named = list(islice(found, NAMED))
    rest = sum(1 for _ in found)
    problems += named
    if rest:
        problems.append(Problem(str(tar), f"{rest:,} more members are damaged", REBUILD))
    if not problems and (digest := _sha256(tar)) != entry.sha256:
        rule = f"is damaged outside its members: SHA-256 {digest[:12]}…, the manifest says {entry.sha256[:12]}…"
        problems.append(Problem(str(tar), rule, REBUILD))
    return problems


def _members(shard: Shard, tar: Path, entry: ShardEntry) -> Iterator[Problem]:
    """Checks each member where the index says it lies, and that nothing lies between them."""
    stem = entry.name.removesuffix(".tar")
    start, offset, text = shard.index.start, shard.index.offset, shard.index.bytes
    expected = 0
    for document in range(entry.documents):
        begin = int(offset[document]) - BLOCK
        if begin != expected:
            yield Problem(
                shard.where(document), f"lies at {begin:,} where {expected:,} follows the one before", REBUILD
            )
        try:
            shard.tokens(document, 0, int(start[document + 1]) - int(start[document]) - 1)
            description = shard.about(document)
        except DamagedError as error:
            yield from error.problems
            following = int(offset[document + 1]) - BLOCK if document + 1 < entry.documents else None
            expected = following if following is not None else -1
            continue
        expected = shard.end(document)
        if description.get("bytes") != int(text[document]):
            where = f"{tar}:{key(stem, document)}.json"
            yield Problem(where, f"states {description.get('bytes')} bytes, the index {int(text[document])}", REBUILD)


def _walk(tar: Path) -> Iterator[Problem]:
    """Follows the headers of a tar without an index, trusting none of them, and names what should not be there."""
    size = tar.stat().st_size
    with tar.open("rb") as file:
        at = 0
        while at + BLOCK <= size:
            file.seek(at)
            block = file.read(BLOCK)
            if not block.strip(b"\0"):
                return
            try:
                member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                yield Problem(f"{tar} @ {at}", f"the tar header is damaged: {error}", REBUILD)
                return
            where = f"{tar}:{member.name} @ {at}"
            if wrong := unsafe(member):
                yield Problem(where, wrong, REBUILD)
            if member.size > ABSURD or at + BLOCK + member.size > size:
                yield Problem(where, f"states {member.size:,} bytes; {max(0, size - at - BLOCK):,} are left", REBUILD)
                return
            at += BLOCK + member.size + padding(member.size)
    yield Problem(f"{tar} @ {at}", "the tar ends without its end mark", REBUILD)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
