"""Text to a data set: gather, train a tokenizer, tokenize, write shards, publish."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tozan.amounts import many, scaled
from tozan.data import manifest as layout
from tozan.data.corpus import gather
from tozan.data.document import Document
from tozan.data.manifest import Amount, Manifest, ShardEntry, Split
from tozan.data.shards import ShardWriter, write_file
from tozan.data.spool import Spool
from tozan.data.staging import publish, staging
from tozan.data.tokenizer import Tokenizer
from tozan.errors import Problem, UserError

BATCH = 2 << 20
"""Characters tokenized at once, on all cores."""
TOKENIZER_BYTES = 16 << 20
"""Text from which a tokenizer is trained; more changes little, and takes long where words are not set apart."""

Tokens = npt.NDArray[np.uint32]


def build(
    sources: Iterable[Document | str | Path],
    out: Path,
    *,
    vocabulary: int = 8192,
    tokenizer: Path | str | None = None,
    validation: float = 0.05,
    shard_bytes: int = 64 << 20,
    seed: int = 0,
    limit: int | None = None,
    overwrite: bool = False,
    notes: Counter[str] | None = None,
    on_event: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Writes documents as a data set of tar shards, or finds that it is there already.

    Repeated texts are written once. Which split a document falls in, and where, follows from its own hash and the
    seed. The same documents and options give the same bytes in every file.

    Args:
        sources: documents, and sources by name as `corpus.gather` takes them; read once, as a stream, in any order.
        out: the folder to write; appears only when everything is in it.
        vocabulary: size of the tokenizer to train on the train split.
        tokenizer: a `tokenizer.json` to use instead of training one.
        validation: share of documents to hold out, at least 0 and below 1.
        shard_bytes: begin a new shard beyond this size.
        seed: chooses split and order.
        limit: use at most this many bytes of text.
        overwrite: replace another data set that stands at `out`.
        notes: what the sources left out or repaired, counted while they were read.
        on_event: is told what is being done.

    Returns:
        What was written, or what stood there if it is the same.

    Raises:
        UserError: an option makes no sense, there is no text, `out` holds something else, or the disk is full.
    """
    out = Path(out)
    _check(out, validation, shard_bytes)
    given = Tokenizer.load(tokenizer) if tokenizer is not None else None
    notes = Counter() if notes is None else notes
    with staging(out) as scratch, Spool(scratch / "spool") as spool:
        spool.fill(_documents(sources, notes, on_event), limit)
        if not len(spool):
            raise UserError(Problem("sources", "there is no text in them", "name files or folders that hold text"))
        texts, again = many(len(spool), "document"), many(spool.duplicates, "duplicate")
        on_event(f"{texts}, {scaled(spool.bytes, 'B')}, {again} left out")
        splits = _splits(spool, validation, seed)
        chosen = given or _train(spool, splits["train"], vocabulary, on_event)
        recipe = {"seed": seed, "validation": validation, "shard_bytes": shard_bytes, **_made_of(spool, chosen)}
        if (found := _standing(out, recipe, overwrite)) is not None:
            on_event(f"{out} holds this data set already; nothing to do")
            return found
        files = scratch / "files"
        manifest = _fill(files, spool, splits, chosen, recipe, notes)
        publish(files, out, overwrite=overwrite)
    tokens = sum(entry.tokens for entry in manifest.shards)
    on_event(f"{tokens:,} tokens in {many(len(manifest.shards), 'shard')}: {out}")
    return manifest


def _made_of(spool: Spool, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the manifest says of the texts and of their tokens."""
    texts = {"corpus_sha256": spool.sha256(), "licences": spool.licences(), "sources": spool.sources()}
    tokens = {"tokenizer_sha256": tokenizer.sha256, "vocabulary": tokenizer.size, "end": tokenizer.end}
    return {**texts, **tokens, "dtype": "uint16" if tokenizer.size <= 1 << 16 else "uint32"}


def _fill(
    folder: Path,
    spool: Spool,
    splits: dict[Split, list[int]],
    tokenizer: Tokenizer,
    recipe: dict[str, Any],
    notes: Counter[str],
) -> Manifest:
    """Writes all files of a data set into a folder, the manifest last."""
    write_file(folder / layout.TOKENIZER, tokenizer.json)
    shards = [entry for split in splits for entry in _write(folder, spool, split, splits[split], tokenizer, recipe)]
    totals = {split: _total(shards, split) for split in splits}
    counted = {note: count for note, count in sorted((spool.notes() + notes).items()) if count}
    manifest = Manifest(**recipe, splits=totals, notes=counted, shards=shards)
    write_file(folder / layout.NAME, manifest.to_json())
    return manifest


def _documents(
    sources: Iterable[Document | str | Path], notes: Counter[str], on_event: Callable[[str], None]
) -> Iterator[Document]:
    """The documents that the sources stand for."""
    for source in [sources] if isinstance(sources, str | Path) else sources:
        if isinstance(source, Document):
            yield source
        else:
            yield from gather([source], notes=notes, on_event=on_event)


def _check(out: Path, validation: float, shard_bytes: int) -> None:
    problems = []
    if not 0 <= validation < 1:
        problems.append(Problem("validation", f"{validation} is not in [0, 1)", "write a share such as 0.05"))
    if shard_bytes < 1 << 16:
        problems.append(Problem("shard_bytes", f"{shard_bytes} is below 65,536", "write 67108864, which is 64 MiB"))
    if out.is_file() or out.is_symlink():
        problems.append(Problem(str(out), "is not a folder", "name a folder to write"))
    elif out.is_dir() and any(out.iterdir()) and not (out / layout.NAME).exists():
        problems.append(Problem(str(out), "holds files that are no data set", "name a new or an empty folder"))
    if problems:
        raise UserError(*problems)


def _standing(out: Path, recipe: dict[str, Any], overwrite: bool) -> Manifest | None:
    """The data set at `out` if it is the one to be built.

    Raises:
        UserError: it is another one.
    """
    if not (out / layout.NAME).exists():
        return None
    try:
        manifest = Manifest.read(out)
    except UserError:
        if overwrite:
            return None
        raise
    differing = [field for field in recipe if getattr(manifest, field) != recipe[field]]
    if not differing:
        return manifest
    if overwrite:
        return None
    rule = f"holds another data set; they differ in {', '.join(differing)}"
    raise UserError(Problem(str(out), rule, "name another folder, or ask to overwrite this one"))


def _splits(spool: Spool, validation: float, seed: int) -> dict[Split, list[int]]:
    """Numbers of the documents of each split, in order; neither split is left empty if that can be helped.

    A corpus of few documents may have none held out by their hashes, or all. Then the end of the longest document is.
    """
    splits = spool.shuffled(validation, seed)
    if validation > 0 and not (splits["train"] and splits["validation"]):
        splits = spool.shuffled(0.0, seed)
        splits["validation"] = spool.cut_longest(1 - validation)
    return {split: numbers for split, numbers in splits.items() if numbers}


def _train(spool: Spool, numbers: list[int], vocabulary: int, on_event: Callable[[str], None]) -> Tokenizer:
    """Trains a tokenizer on the train split, up to `TOKENIZER_BYTES` of it in shuffled order."""

    def texts() -> Iterator[str]:
        room = TOKENIZER_BYTES
        for number in numbers:
            text = spool.document(number).text
            yield text
            if (room := room - len(text.encode())) <= 0:
                return

    on_event(f"training a tokenizer of {vocabulary:,} tokens")
    return Tokenizer.train(texts(), vocabulary)


def _write(
    folder: Path, spool: Spool, split: Split, numbers: list[int], tokenizer: Tokenizer, recipe: dict[str, Any]
) -> Iterator[ShardEntry]:
    """Tokenizes the documents of a split and writes its shards."""
    facts = {name: recipe[name] for name in ("tokenizer_sha256", "dtype", "vocabulary")}
    pairs = _tokenized(spool, numbers, tokenizer)
    pair = next(pairs, None)
    number = 0
    while pair is not None:
        with ShardWriter(folder, split, number, facts) as shard:
            while pair is not None and shard.size < recipe["shard_bytes"]:
                shard.add(*pair)
                pair = next(pairs, None)
            yield shard.finish()
        number += 1


def _tokenized(spool: Spool, numbers: list[int], tokenizer: Tokenizer) -> Iterator[tuple[Document, Tokens]]:
    """Documents with their tokens; tokenized in batches of about `BATCH` characters."""
    documents = (spool.document(number) for number in numbers)
    while batch := _batch(documents):
        yield from zip(batch, tokenizer.encode_batch([document.text for document in batch]), strict=True)


def _batch(documents: Iterator[Document]) -> list[Document]:
    batch: list[Document] = []
    size = 0
    for document in islice(documents, 4096):
        batch.append(document)
        size += len(document.text)
        if size >= BATCH:
            break
    return batch


def _total(shards: list[ShardEntry], split: Split) -> Amount:
    of = [shard for shard in shards if shard.split == split]
    return Amount(
        documents=sum(shard.documents for shard in of),
        bytes=sum(shard.bytes for shard in of),
        tokens=sum(shard.tokens for shard in of),
    )
