"""Documents on their way from a source to the shards: kept in one file, known by a few numbers each in memory."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from tozan.data.document import Document, checked, fingerprint
from tozan.data.manifest import Amount, Split

LISTED = 500
"""Licences and sources named one by one in a manifest; the smallest of more are counted together."""


class Spool:
    """Takes documents in, drops repeated texts, and gives them back by number, in any order.

    Memory: about 150 bytes a document. Disk: the text itself, until the data set is written.
    """

    def __init__(self, path: Path) -> None:
        """Opens a new spool file."""
        self._file = path.open("x+b")
        self._at = array("Q")
        self._length = array("I")
        self._texts: set[bytes] = set()
        self._digests = bytearray()
        self._groups = bytearray()
        self.bytes = 0
        self.duplicates = 0
        self.empty = 0
        self._licences: dict[str, list[int]] = {}
        self._sources: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._at)

    def fill(self, documents: Iterable[Document], limit: int | None = None) -> None:
        """Takes in documents until there are no more, or their text would be longer than `limit` bytes.

        Raises:
            UserError: a document cannot be written.
        """
        for document in documents:
            if not document.text.strip():
                self.empty += 1
                continue
            text = checked(document).text
            known = fingerprint(text)
            if known in self._texts:
                self.duplicates += 1
                continue
            size = len(text.encode())
            if limit is not None and self.bytes + size > limit:
                return
            self._texts.add(known)
            self._append(document, size)

    def _append(self, document: Document, size: int) -> None:
        self._store(document)
        content = hashlib.sha256(document.text.encode()).digest()
        digest = hashlib.sha256(document.name.encode() + b"\0" + content).digest()
        self._digests += digest
        self._groups += hashlib.sha256(document.group.encode()).digest()[:16] if document.group else digest[:16]
        self.bytes += size
        for table, name in ((self._licences, document.licence), (self._sources, document.source)):
            amount = table.setdefault(name, [0, 0])
            amount[0] += 1
            amount[1] += size

    def _store(self, document: Document) -> None:
        head = [document.name, document.source, document.licence, document.group]
        data = json.dumps([*head, document.text], ensure_ascii=False).encode()
        self._at.append(self._file.seek(0, 2))
        self._length.append(len(data))
        self._file.write(data)

    def document(self, number: int) -> Document:
        """Reads one document back."""
        self._file.seek(self._at[number])
        name, source, licence, group, text = json.loads(self._file.read(self._length[number]))
        return Document(name, text, source, licence, group)

    def cut_longest(self, share: float) -> list[int]:
        """Cuts the longest document in two at a line's end, about where `share` of it ends.

        Returns:
            The number of the new document that holds the rest, or nothing if there is nothing to cut.
        """
        longest = max(range(len(self)), key=self._length.__getitem__)
        document = self.document(longest)
        cut = max(1, int(len(document.text) * share))
        cut = document.text.rfind("\n", 0, cut) + 1 or cut
        if cut >= len(document.text):
            return []
        self._store(replace(document, name=f"{document.name} (end)", text=document.text[cut:]))
        self._store(replace(document, text=document.text[:cut]))
        self._at[longest], self._length[longest] = self._at.pop(), self._length.pop()
        return [len(self) - 1]

    def sha256(self) -> str:
        """Hash over the names and texts of all documents, whatever their order."""
        digests = sorted(self._digests[at : at + 32] for at in range(0, len(self._digests), 32))
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def shuffled(self, validation: float, seed: int) -> dict[Split, list[int]]:
        """Which documents each split has, in which order.

        A document's split and place follow from its own hash and the seed alone, so they stay the same when documents
        are added, removed or gathered in another order.

        Args:
            validation: share of documents (or of groups of them) to hold out.
            seed: chooses split and order.

        Returns:
            The numbers of each split's documents, in the order in which they are to be written.
        """
        held_out = [_fraction(self._groups[at : at + 16], "split", seed) for at in range(0, 16 * len(self), 16)]
        place = [_fraction(self._digests[at : at + 32], "order", seed) for at in range(0, 32 * len(self), 32)]
        order = np.argsort(np.array(place), kind="stable")
        chosen = np.array(held_out)[order] < validation
        return {"train": order[~chosen].tolist(), "validation": order[chosen].tolist()}

    def licences(self) -> dict[str, Amount]:
        """How much there is under each licence."""
        return _largest(self._licences)

    def sources(self) -> dict[str, Amount]:
        """How much there is from each source."""
        return _largest(self._sources)

    def notes(self) -> Counter[str]:
        """What was left out."""
        return +Counter({"duplicates left out": self.duplicates, "empty documents left out": self.empty})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _fraction(digest: bytes | bytearray, purpose: str, seed: int) -> float:
    """A number in [0, 1) that depends on a hash, a purpose and a seed."""
    keyed = hashlib.blake2b(bytes(digest), digest_size=8, key=f"{purpose} {seed}".encode()[:64]).digest()
    return int.from_bytes(keyed, "little") / 2**64


def _largest(table: dict[str, list[int]]) -> dict[str, Amount]:
    rows = sorted(table.items(), key=lambda row: (-row[1][1], row[0]))
    amounts = {name: Amount(documents=documents, bytes=size) for name, (documents, size) in rows[:LISTED]}
    if rest := [amount for _, amount in rows[LISTED:]]:
        amounts[f"{len(rest)} more"] = Amount(documents=sum(a[0] for a in rest), bytes=sum(a[1] for a in rest))
    return dict(sorted(amounts.items()))
