"""A document: the unit that is deduplicated, split, shuffled and written as one pair of tar members."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tozan.errors import Problem, UserError

LONGEST = 64 << 20
"""Largest text of one document, in characters; longer files are cut into parts before they become documents."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its origin.

    Attributes:
        name: what it is called inside its source, such as `asyncio/queues.py` or `man3/printf.3`.
        text: the text itself; any Unicode, no lone surrogates.
        source: where it comes from, such as `Python 3.11.7 standard library`.
        licence: under which terms, as an SPDX identifier where there is one; `unknown` if nobody said.
        group: documents of one group land in the same split, so that a page made from a file is not held out
            while the file itself is trained on. Empty: the document stands alone.
    """

    name: str
    text: str
    source: str
    licence: str
    group: str = ""


def fingerprint(text: str) -> bytes:
    """The 16 bytes by which equal texts are found: a hash over the words, whatever the white space between them."""
    words = " ".join(text.split())
    return hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def checked(document: Document) -> Document:
    """Returns the document if it can be written.

    Raises:
        UserError: the text holds lone surrogates (it is not Unicode text), or is longer than `LONGEST`.
    """
    where = f"{document.source}: {document.name}"
    if len(document.text) > LONGEST:
        rule = f"a document of {len(document.text):,} characters; the limit is {LONGEST:,}"
        raise UserError(Problem(where, rule, "cut it into several documents"))
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        rule = f"the text has a lone surrogate U+{ord(document.text[error.start]):04X} at character {error.start:,}"
        raise UserError(Problem(where, rule, "decode the source with its real encoding")) from None
    return document
