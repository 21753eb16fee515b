"""A user's own text, in all the forms it comes in."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tozan.data import files
from tozan.data.corpus import folder, gather
from tozan.errors import UserError

TEXT = "山頂へ\nthe summit\n"
ROWS = [{"text": "first", "id": "a", "license": "MIT"}, {"text": "second 山", "source": "web"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def pack(path: Path, content: bytes) -> None:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "a.py.zst", "strange", "strange.gz", "a.TXT"])
def test_text_files(tmp_path: Path, name: str):
    pack(tmp_path / name, TEXT.encode())
    (document,) = folder(tmp_path / name, licence="CC0-1.0")
    assert (document.name, document.text, document.licence) == (name, TEXT, "CC0-1.0")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson.zst"])
def test_json_lines(tmp_path: Path, name: str):
    pack(tmp_path / name, LINES)
    first, second = folder(tmp_path / name)
    assert (first.name, first.text, first.licence) == ("a", "first", "MIT")
    assert (second.name, second.text, second.source, second.licence) == (f"{name}:2", "second 山", "web", "unknown")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_archives_in_several_pieces(tmp_path: Path, name: str):
    pack(tmp_path / name, b"one\n")
    first = (tmp_path / name).read_bytes()
    pack(tmp_path / name, b"two\n")
    (tmp_path / name).write_bytes(first + (tmp_path / name).read_bytes())
    assert next(folder(tmp_path / name)).text == "one\ntwo\n"


def test_parquet(tmp_path: Path):
    table = pyarrow.table({"body": ["first", None, "third"], "licence": ["MIT", None, None], "other": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    notes = Counter()
    found = list(folder(tmp_path / "a.parquet", field="body", notes=notes))
    assert [(d.text, d.licence) for d in found] == [("first", "MIT"), ("third", "unknown")]
    assert notes == {"rows without text left out": 1}
    with pytest.raises(UserError, match="no column 'text'; it has body, licence, other"):
        list(folder(tmp_path / "a.parquet"))


def test_folders_and_patterns(tmp_path: Path):
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    (root / ".git").mkdir()
    for name in ("b.txt", "deep/a.md", "deep/page.html", "image.png", ".git/config.txt"):
        (root / name).write_text(f"<p>{name}</p>")
    notes = Counter()
    found = {document.name: document.text for document in folder(root, notes=notes)}
    assert list(found) == ["texts/b.txt", "texts/deep/a.md", "texts/deep/page.html"]
    assert found["texts/deep/page.html"] == "deep/page.html\n"
    assert notes == {"files left out: .png": 1}
    assert [d.name for d in gather([f"{root}/**/*.md", root / "b.txt"])] == ["a.md", "b.txt"]


def test_line_ends_and_byte_order_marks(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert next(folder(tmp_path / "a.txt")).text == "one\ntwo\nthree\n"
    (tmp_path / "b.txt").write_bytes("山\r\n".encode("utf-16"))
    assert next(folder(tmp_path / "b.txt", encoding="utf-16")).text == "山\n"


def test_bytes_that_are_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"good \xff bad\n")
    (tmp_path / "b.txt").write_bytes("山".encode("shift_jis"))
    with pytest.raises(UserError) as caught:
        list(folder(tmp_path))
    assert [str(problem.where) for problem in caught.value.problems] == [str(tmp_path / n) for n in ("a.txt", "b.txt")]
    assert "byte 5 is 0xff" in caught.value.problems[0].what
    notes = Counter()
    assert next(folder(tmp_path / "a.txt", errors="replace", notes=notes)).text == "good \ufffd bad\n"
    assert notes == {"characters replaced": 1}
    assert next(folder(tmp_path / "b.txt", encoding="shift_jis")).text == "山"


@given(
    text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\r\ufeff")),
    size=st.integers(1, 40),
)
@settings(max_examples=100, deadline=None)
def test_parts_of_a_long_file_lose_nothing(tmp_path_factory, text: str, size: int):
    path = tmp_path_factory.mktemp("long") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PART", size)
        assert "".join(document.text for document in folder(path)) == text


def test_every_mistake_in_json_is_told_with_its_line(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\nnonsense\n\n{"body": "x"}\n[1]\n{"text": 5}\n\xff\n')
    with pytest.raises(UserError) as caught:
        list(folder(tmp_path / "a.jsonl"))
    assert [problem.where.rsplit(":", 1)[1] for problem in caught.value.problems] == ["2", "4", "5", "6", "7"]
    assert "it has body" in caught.value.problems[1].what


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("how", ["noise", "cut"])
def test_damaged_archives_are_named(tmp_path: Path, name: str, how: str):
    pack(tmp_path / name, LINES * 100)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"noise" * 30 if how == "noise" else content[: len(content) // 2])
    with pytest.raises(UserError) as caught:
        list(folder(tmp_path / name))
    assert name in caught.value.problems[0].where


def test_paths_that_lead_nowhere(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        list(folder(tmp_path / "none.txt", tmp_path / "*.nothing"))
    assert len(caught.value.problems) == 2
    with pytest.raises(UserError, match="encoding"):
        list(folder(tmp_path, encoding="klingon"))
