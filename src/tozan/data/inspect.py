"""What a data set holds, for people to read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tozan.amounts import many, scaled
from tozan.data.manifest import Amount, Manifest
from tozan.data.reader import Shard
from tozan.data.tokenizer import Tokenizer
from tozan.data.verify import check_tokenizer


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a document, decoded from its tokens.

    Attributes:
        name: of the document.
        source: where it comes from.
        licence: under which terms.
        text: its first characters.
    """

    name: str
    source: str
    licence: str
    text: str


@dataclass(frozen=True)
class Description:
    """What `inspect` finds; `str` of it is a page for a terminal.

    Attributes:
        path: folder of the data set.
        manifest: all that it says about itself.
        excerpts: beginnings of the first documents of the train split (or of the only split).
    """

    path: Path
    manifest: Manifest
    excerpts: list[Excerpt]

    def __str__(self) -> str:
        """Sizes, licences, sources, shards and excerpts, one below the other."""
        manifest = self.manifest
        lines = [f"{self.path}", f"corpus {manifest.corpus_sha256[:16]}…, tokenizer {manifest.tokenizer_sha256[:16]}…"]
        lines.append(f"vocabulary {manifest.vocabulary:,}, stored as {manifest.dtype}, seed {manifest.seed}")
        lines += ["", f"{'split':<12}{'documents':>12}{'tokens':>16}{'text':>12}{'bytes/token':>13}{'shards':>8}"]
        for split, amount in manifest.splits.items():
            ratio = amount.bytes / max(1, amount.tokens)
            shards = len(manifest.of(split))
            sizes = f"{amount.documents:>12,}{amount.tokens:>16,}{scaled(amount.bytes, 'B'):>12}"
            lines.append(f"{split:<12}{sizes}{ratio:>13.2f}{shards:>8,}")
        lines += _table("licences", manifest.licences) + _table("sources", manifest.sources)
        if manifest.notes:
            lines += ["", "notes"] + [f"{count:>12,}  {note}" for note, count in manifest.notes.items()]
        lines += ["", f"{'shard':<24}{'documents':>12}{'tokens':>16}{'size':>12}"]
        for shard in manifest.shards:
            lines.append(f"{shard.name:<24}{shard.documents:>12,}{shard.tokens:>16,}{scaled(shard.size, 'B'):>12}")
        for excerpt in self.excerpts:
            lines += ["", f"--- {excerpt.name} ({excerpt.source}, {excerpt.licence})", excerpt.text.rstrip()]
        return "\n".join(lines)


def inspect(path: Path | str, *, documents: int = 3, characters: int = 400) -> Description:
    """Describes a data set.

    Args:
        path: folder written by `build`.
        documents: how many excerpts.
        characters: length of an excerpt.

    Raises:
        UserError: there is no data set, or what is to be shown of it is damaged.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    tokenizer = Tokenizer.load(check_tokenizer(path, manifest))
    excerpts: list[Excerpt] = []
    for entry in manifest.shards:
        if len(excerpts) >= documents:
            break
        shard = Shard(path, entry, manifest, bytearray(entry.documents))
        for document in range(min(documents - len(excerpts), entry.documents)):
            excerpts.append(_excerpt(shard, document, tokenizer, characters))
    return Description(path, manifest, excerpts)


def _excerpt(shard: Shard, document: int, tokenizer: Tokenizer, characters: int) -> Excerpt:
    length = int(shard.index.start[document + 1]) - int(shard.index.start[document]) - 1
    # A token is at least a byte and a character at most four, so this many tokens are enough.
    tokens = shard.tokens(document, 0, min(length, 4 * characters))
    about = shard.about(document)
    text = tokenizer.decode(tokens.tolist())[:characters]
    return Excerpt(str(about["name"]), str(about["source"]), str(about["licence"]), text)


def _table(title: str, amounts: dict[str, Amount]) -> list[str]:
    rows = sorted(amounts.items(), key=lambda row: -row[1].bytes)
    return ["", title, *(f"{many(a.documents, 'document'):>21} {scaled(a.bytes, 'B'):>12}  {name}" for name, a in rows)]
