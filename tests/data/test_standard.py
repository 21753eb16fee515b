"""The corpus of the running Python's library."""

import ast
from itertools import islice

import pytest

from tozan.data.document import Document
from tozan.data.standard import standard_library


@pytest.fixture(scope="module")
def texts() -> list[Document]:
    return list(standard_library(limit=6_000_000))


def test_the_order_never_changes(texts: list[Document]):
    assert list(islice(standard_library(), 150)) == texts[:150]


def test_there_are_topics_pages_and_source(texts: list[Document]):
    found = {document.name: document for document in texts}
    assert "for_stmt" in found["topics/for"].text
    assert "Return the arc cosine" in found["math (documentation)"].text
    assert "$module" not in found["math (documentation)"].text
    assert "def insort_right(a, x" in found["bisect.py (documentation)"].text
    ast.parse(found["bisect.py"].text)
    assert found["bisect.py"].group == found["bisect.py (documentation)"].group


def test_licence_source_and_what_is_left_out(texts: list[Document]):
    assert {document.licence for document in texts} == {"PSF-2.0"}
    assert not [d.name for d in texts if "/test/" in d.name or "site-packages" in d.name or "encodings/" in d.name]
    assert len({document.name for document in texts}) == len(texts)


def test_the_limit_holds(texts: list[Document]):
    assert sum(len(document.text) for document in texts) <= 6_000_000
    assert sum(len(document.text) for document in standard_library(limit=10_000)) <= 10_000
