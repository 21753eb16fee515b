"""What a data set says about itself: `manifest.json`, written last, so that whatever has one is complete."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tozan import files
from tozan.errors import Problem, UserError

NAME = "manifest.json"
TOKENIZER = "tokenizer.json"

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Split = Literal["train", "validation"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Amount(_Record):
    """How much there is of something.

    Attributes:
        documents: number of documents.
        bytes: length of their text in UTF-8.
        tokens: length in tokens, with the end token of each document (0 where nobody counted).
    """

    documents: Count
    bytes: Count
    tokens: Count = 0


class ShardEntry(Amount):
    """One tar file and its index.

    Attributes:
        name: file name of the tar.
        split: the split it belongs to.
        size: length of the tar in bytes.
        sha256: hash of the tar.
        index: file name of its index.
        index_size: length of the index in bytes.
        index_sha256: hash of the index.
    """

    name: FileName
    split: Split
    size: Count
    sha256: Digest
    index: FileName
    index_size: Count
    index_sha256: Digest


class Manifest(_Record):
    """A finished data set.

    Attributes:
        format: always `tozan-data`.
        version: version of the layout of files and indexes.
        tokenizer_sha256: hash of the `tokenizer.json` beside the manifest.
        vocabulary: every token is below this.
        end: the token after each document.
        dtype: how tokens are stored, little endian.
        seed: chose the split and the order of documents.
        validation: share of documents that was asked to be held out.
        shard_bytes: size at which a new shard is begun.
        corpus_sha256: hash over all documents, whatever their order.
        splits: how much there is in each split.
        licences: how much there is under each licence.
        sources: how much there is from each source.
        notes: what was left out or repaired on the way, counted.
        shards: the files, in the order of the stream.
    """

    format: Literal["tozan-data"] = "tozan-data"
    version: Literal[1] = 1
    tokenizer_sha256: Digest
    vocabulary: Annotated[int, Field(gt=0, le=1 << 32)]
    end: Count
    dtype: Literal["uint16", "uint32"]
    seed: int
    validation: Annotated[float, Field(ge=0.0, lt=1.0)]
    shard_bytes: Count
    corpus_sha256: Digest
    splits: dict[Split, Amount]
    licences: dict[str, Amount]
    sources: dict[str, Amount]
    notes: dict[str, Count]
    shards: list[ShardEntry]

    def of(self, split: str) -> list[ShardEntry]:
        """The shards of a split, in the order of the stream."""
        return [shard for shard in self.shards if shard.split == split]

    def to_json(self) -> bytes:
        """The file's bytes: the record and, as its last key, a checksum over the rest."""
        record = self.model_dump()
        return (json.dumps({**record, "checksum": _checksum(record)}, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads and checks `folder/manifest.json`.

        Raises:
            UserError: there is none, it was damaged, or it was written by another version.
        """
        path = folder / NAME
        try:
            record = json.loads(files.read(path))
        except FileNotFoundError:
            there = folder.is_dir()
            rule = "there is no finished data set here" if there else "there is no such folder"
            raise UserError(
                Problem(str(path if there else folder), rule, "write one with `tozan data build`")
            ) from None
        except OSError as error:
            raise UserError(Problem(str(path), f"cannot be read: {error.strerror}")) from None
        except (ValueError, RecursionError) as error:
            raise UserError(Problem(str(path), f"is damaged: {error}", _REBUILD)) from None
        if not isinstance(record, dict) or record.get("format") != "tozan-data":
            raise UserError(Problem(str(path), "is not the manifest of a tozan data set", _REBUILD))
        if record.get("version") != 1:
            rule = f"has version {record.get('version')!r}; this tozan reads version 1"
            raise UserError(Problem(str(path), rule, "build it again, or use the tozan that wrote it"))
        stated = record.pop("checksum", None)
        if stated != (found := _checksum(record)):
            rule = f"is damaged: its contents hash to {found[:12]}…, it states {str(stated)[:12]}…"
            raise UserError(Problem(str(path), rule, _REBUILD))
        try:
            return cls.model_validate(record)
        except ValidationError as error:
            raise UserError(
                *(Problem(f"{path}: {'.'.join(map(str, e['loc']))}", e["msg"], _REBUILD) for e in error.errors())
            ) from None


_REBUILD = "copy it again from where it is whole, or build the data set again"


def _checksum(record: dict[str, object]) -> str:
    canonical = json.dumps(record, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
