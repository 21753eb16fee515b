"""The texts a data set can be built from, each a stream of documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from tozan.data.debian import debian
from tozan.data.document import Document
from tozan.data.files import folder
from tozan.data.standard import standard_library

NAMED = ("standard-library", "debian")
"""Sources that go by a name; everything else is a path or a pattern."""

__all__ = ["NAMED", "debian", "folder", "gather", "standard_library"]


def gather(
    sources: Iterable[str | Path],
    *,
    licence: str = "unknown",
    field: str = "text",
    encoding: str = "utf-8",
    errors: Literal["refuse", "replace"] = "refuse",
    notes: Counter[str] | None = None,
    on_event: Callable[[str], None] = lambda _: None,
) -> Iterator[Document]:
    """Documents from sources as they are written on a command line.

    Args:
        sources: `standard-library`, `debian`, or a file, folder or pattern.
        licence: see `folder`.
        field: see `folder`.
        encoding: see `folder`.
        errors: see `folder`.
        notes: counts what was left out or repaired.
        on_event: is told what is being done.

    Yields:
        The documents of one source after the other.

    Raises:
        UserError: as the sources' own functions do.
    """
    for source in sources:
        if source == "standard-library":
            yield from standard_library()
        elif source == "debian":
            yield from debian(notes=notes, on_event=on_event)
        else:
            yield from folder(source, licence=licence, field=field, encoding=encoding, errors=errors, notes=notes)
