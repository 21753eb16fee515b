"""A user's own text: files, folders, patterns; plain, JSON lines or Parquet; bare, `.gz` or `.zst`."""

from __future__ import annotations

import codecs
import dataclasses
import glob
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from tozan.data.document import Document
from tozan.data.webpage import webpage_text
from tozan.errors import Problem, UserError

PART = 16 << 20
"""Bytes of one document; a longer text file becomes several documents, cut at line ends."""
LINE = 256 << 20
"""Longest line of JSON, in bytes."""
NAMED = 20
"""Mistakes collected before reading stops."""
WEB = {".htm", ".html", ".xhtml"}
TABLES = {".jsonl", ".ndjson", ".parquet"}
TEXT = re.compile(
    r"\.(txt|text|md|markdown|rst|tex|org|adoc|log|srt|csv|tsv|json|xml|toml|ya?ml|ini|cfg|pyi?|c|h|cc|cpp|cxx|hpp|cu|rs"
    r"|go|java|kt|scala|jsx?|tsx?|css|sh|bash|p[lm]|rb|lua|php|r|jl|m|f|f9[05]|hs|ml|ex|erl|clj|lisp|el|sql|swift|zig)"
)
"""File names in a folder that are read as text; files named one by one are read whatever they are called."""


@dataclass
class _Reading:
    """How to read, and what went wrong so far."""

    encoding: str
    errors: Literal["refuse", "replace"]
    field: str
    licence: str
    notes: Counter[str]
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def wrong(self, where: str, what: str, fix: str) -> None:
        """Notes a mistake; enough of them end the reading."""
        self.problems.append(Problem(where, what, fix))
        if len(self.problems) >= NAMED:
            raise UserError(*self.problems)


def folder(
    *paths: Path | str,
    licence: str = "unknown",
    field: str = "text",
    encoding: str = "utf-8",
    errors: Literal["refuse", "replace"] = "refuse",
    notes: Counter[str] | None = None,
) -> Iterator[Document]:
    """Documents from files, folders and patterns, in sorted order, read as a stream.

    A text file is a document (a very long one is several); a line of JSON or a row of Parquet is one each. Web pages
    become plain text. Text is UTF-8 unless told otherwise, and must be valid.

    Args:
        paths: files, folders (with all below them) and patterns such as `texts/**/*.jsonl.zst`.
        licence: of the texts that do not state their own; rows may have a field `licence` or `license`.
        field: the field or column that holds the text; `name` (or `id`) and `source` are taken if they are there.
        encoding: of text files.
        errors: bytes that are no text in `encoding` are mistakes (`refuse`), or become U+FFFD and are counted.
        notes: counts what was left out or repaired.

    Yields:
        The documents; their names begin with the name of the file or folder that was given.

    Raises:
        UserError: a path leads nowhere, or files cannot be read as what they are; told at the end, all at once.
    """
    reading = _Reading(encoding, errors, field, licence, Counter() if notes is None else notes)
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise UserError(
            Problem("encoding", f"{encoding!r} is not known", "write utf-8, shift_jis, euc_jp, …")
        ) from None
    for given in paths:
        for path, name in _found(Path(given), reading):
            try:
                yield from _documents(path, name, reading)
            except (EOFError, zlib.error) as error:
                reading.wrong(str(path), f"the compressed file is damaged: {error}", "copy it again")
            except OSError as error:
                reading.wrong(str(path), f"cannot be read: {error.strerror or error}", "check the file")
    if reading.problems:
        raise UserError(*reading.problems)


def _found(given: Path, reading: _Reading) -> Iterator[tuple[Path, str]]:
    """The files that a path stands for, each with the name its documents get."""
    if given.is_file():
        yield given, given.name
    elif given.is_dir():
        root = given.resolve().name
        for path in sorted(path for path in given.rglob("*") if path.is_file()):
            inside = path.relative_to(given)
            if any(part.startswith(".") for part in inside.parts):
                continue
            if not TEXT.fullmatch(kind := _kind(path)) and kind not in TABLES | WEB:
                reading.notes[f"files left out: {kind or 'no suffix'}"] += 1
                continue
            yield path, f"{root}/{inside.as_posix()}"
    elif matches := sorted(glob.iglob(str(given), recursive=True)):  # noqa: PTH207 (patterns may be absolute)
        for match in map(Path, matches):
            if match.is_file():
                yield match, match.name
    else:
        reading.wrong(str(given), "there is no such file or folder, and no file matches it", "check the path")


def _kind(path: Path) -> str:
    """The suffix that says what is inside, behind `.gz` and `.zst`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
        return suffixes[-1] if suffixes else ".txt"
    return suffixes[-1] if suffixes else ""


def _documents(path: Path, name: str, reading: _Reading) -> Iterator[Document]:
    kind = _kind(path)
    if kind == ".parquet":
        yield from _rows(path, name, reading)
        return
    with _opened(path) as file:
        if kind in TABLES:
            yield from _lines(file, path, name, reading)
            return
        for number, text in enumerate(_texts(file, path, reading)):
            about = f"{name} (part {number + 1})" if number else name
            yield Document(about, webpage_text(text) if kind in WEB else text, name.split("/")[0], reading.licence)


def _opened(path: Path) -> IO[bytes] | gzip.GzipFile:
    """Opens a file for reading, unpacking what is inside; a truncated archive is an error, several in a row are not."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow

        # The zstandard module's own reader takes a truncated file for a whole one.
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _texts(file: IO[bytes] | gzip.GzipFile, path: Path, reading: _Reading) -> Iterator[str]:
    """The parts of a text file, about `PART` bytes each, with plain line ends and without a byte order mark."""
    decoder = codecs.getincrementaldecoder(reading.encoding)("strict" if reading.errors == "refuse" else "replace")
    kept, read, last = "", 0, False
    while not last:
        data = file.read(PART)
        last = not data
        read += len(data)
        try:
            text = kept + decoder.decode(data, final=last)
        except UnicodeDecodeError as error:
            at = read - len(error.object) + error.start
            rule = f"byte {at:,} is 0x{error.object[error.start]:02x}, which is no {reading.encoding} text"
            reading.wrong(str(path), rule, "name its encoding, convert it with iconv, or ask for errors='replace'")
            return
        if reading.errors == "replace" and (bad := text.count("\ufffd") - kept.count("\ufffd")):
            reading.notes["characters replaced"] += bad
        cut = len(text) if last else text.rfind("\n") + 1 or len(text)
        part, kept = text[:cut], text[cut:]
        if part:
            yield part.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _lines(file: IO[bytes] | gzip.GzipFile, path: Path, name: str, reading: _Reading) -> Iterator[Document]:
    """A document for each line of JSON."""
    number = 0
    while line := file.readline(LINE):
        number += 1
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reading.wrong(where, f"is no JSON: {error}", "write one JSON object on each line, in UTF-8")
            continue
        if not isinstance(row, dict) or not isinstance(row.get(reading.field), str):
            known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            reading.wrong(
                where, f"has no text in field {reading.field!r}; it has {known}", "name the field with the text"
            )
            continue
        yield _from_row(row, f"{name}:{number}", name, reading)


def _rows(path: Path, name: str, reading: _Reading) -> Iterator[Document]:
    """A document for each row of a Parquet file that is not null."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            known = file.schema_arrow.names
            if reading.field not in known:
                rule = f"has no column {reading.field!r}; it has {', '.join(known)}"
                reading.wrong(str(path), rule, "name the column with the text")
                return
            columns = [column for column in (reading.field, *_ABOUT) if column in known]
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    if isinstance(row[reading.field], str):
                        yield _from_row(row, f"{name}:{number}", name, reading)
                    else:
                        reading.notes["rows without text left out"] += 1
    except pyarrow.ArrowException as error:
        reading.wrong(str(path), f"is no readable Parquet file: {error}", "copy it again")


_ABOUT = ("name", "id", "source", "licence", "license")


def _from_row(row: dict[str, Any], place: str, source: str, reading: _Reading) -> Document:
    def first(*fields: str) -> str:
        return next((value for name in fields if isinstance(value := row.get(name), str) and value), "")

    name, licence = first("name", "id") or place, first("licence", "license") or reading.licence
    return Document(name, row[reading.field], first("source") or source.split("/")[0], licence)
