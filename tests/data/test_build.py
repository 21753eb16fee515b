"""Building: deterministic, whole or not at all, readable by other tools."""

import errno
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tozan import data
from tozan.data import shards, staging
from tozan.errors import UserError

OPTIONS = {"vocabulary": 400, "shard_bytes": 1 << 16, "validation": 0.2}


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_same_documents_give_the_same_bytes(built: Path, documents, tmp_path: Path):
    shuffled = documents()
    random.Random(9).shuffle(shuffled)
    data.build(shuffled, tmp_path / "again", **OPTIONS)
    assert hashes(tmp_path / "again") == hashes(built)


def test_another_seed_gives_another_split_of_the_same_corpus(built: Path, documents, tmp_path: Path):
    first = data.Manifest.read(built)
    second = data.build(documents(), tmp_path / "other", **OPTIONS, seed=1)
    assert first.corpus_sha256 == second.corpus_sha256
    assert {s.sha256 for s in first.shards}.isdisjoint(s.sha256 for s in second.shards)


def test_other_tools_read_the_shards(built: Path):
    manifest = data.Manifest.read(built)
    webdataset = pytest.importorskip("webdataset")
    for entry in manifest.shards:
        listed = subprocess.run(["tar", "tf", built / entry.name], capture_output=True, text=True, check=True)
        assert len(listed.stdout.split()) == 2 * entry.documents
        stem = entry.name.removesuffix(".tar")
        assert listed.stdout.split()[:2] == [f"{stem}-0000000.tokens", f"{stem}-0000000.json"]
        samples = list(webdataset.WebDataset(str(built / entry.name), shardshuffle=False))
        assert len(samples) == entry.documents
        assert sum(len(sample["tokens"]) // 2 + 1 for sample in samples) == entry.tokens
        with tarfile.open(built / entry.name) as archive:
            assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in archive} == {(0, 0, 0, 0o644, "")}


def test_the_manifest_counts_what_is_there(built: Path, documents):
    manifest = data.Manifest.read(built)
    made = documents()
    assert sum(amount.documents for amount in manifest.splits.values()) == len(made)
    for licence, amount in manifest.licences.items():
        of = [document for document in made if document.licence == licence]
        assert (amount.documents, amount.bytes) == (len(of), sum(len(d.text.encode()) for d in of))
    held_out = manifest.splits["validation"].documents / len(made)
    assert 0.1 < held_out < 0.3


def test_splits_stay_when_documents_are_added(documents, tmp_path: Path):
    def held_out(count: int) -> set[str]:
        folder = tmp_path / str(count)
        data.build(documents(200)[:count], folder, vocabulary=300, validation=0.2)
        with tarfile.open(folder / "validation-00000.tar") as archive:
            found = [archive.extractfile(m).read() for m in archive if m.name.endswith(".json")]
        return {json.loads(about)["name"] for about in found}

    few, many = held_out(100), held_out(200)
    assert few == {name for name in many if int(name.split("-")[1]) < 100}


def test_groups_are_not_torn_apart(tmp_path: Path):
    texts = [data.Document(f"{n}", f"text {n} " * 20, "s", "l", group=f"g{n // 4}") for n in range(400)]
    data.build(texts, tmp_path / "set", vocabulary=300, validation=0.3)
    groups = {}
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / "set" / f"{split}-00000.tar") as archive:
            members = [json.load(archive.extractfile(m)) for m in archive if m.name.endswith(".json")]
        groups[split] = {int(member["name"]) // 4 for member in members}
    assert groups["train"].isdisjoint(groups["validation"])


def test_duplicates_and_empty_texts_are_left_out(tmp_path: Path):
    texts = ["one two", "one  two\n", "", " \n", "three", "one two"]
    sources = [data.Document(f"{n}", text, "s", "l") for n, text in enumerate(texts)]
    manifest = data.build(sources, tmp_path / "set", vocabulary=257, validation=0)
    assert manifest.splits["train"].documents == 2
    assert manifest.notes == {"duplicates left out": 2, "empty documents left out": 2}


def test_a_single_document_still_has_an_end_to_hold_out(tmp_path: Path):
    text = "".join(f"line {n}\n" for n in range(1000))
    manifest = data.build([data.Document("book", text, "s", "l")], tmp_path / "set", vocabulary=300, validation=0.1)
    sizes = {split: amount.bytes for split, amount in manifest.splits.items()}
    assert sum(sizes.values()) == len(text)
    assert 0.08 < sizes["validation"] / len(text) < 0.12
    assert data.verify(tmp_path / "set") == []


def test_a_finished_build_is_not_done_again(built: Path, documents, copy: Path, monkeypatch: pytest.MonkeyPatch):
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    told = []
    manifest = data.build(documents(), copy, **OPTIONS, on_event=told.append)
    assert "already" in told[-1]
    assert manifest == data.Manifest.read(built)
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_another_data_set_is_only_replaced_on_request(copy: Path, documents):
    with pytest.raises(UserError, match="another data set; they differ in corpus_sha256"):
        data.build(documents(50), copy, **OPTIONS)
    data.build(documents(50), copy, **OPTIONS, overwrite=True)
    assert sum(a.documents for a in data.Manifest.read(copy).splits.values()) == 50
    assert sorted(path.name for path in copy.parent.iterdir()) == ["set"]


def test_folders_with_other_files_are_left_alone(tmp_path: Path, documents):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="no data set"):
        data.build(documents(5), tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_all_bad_options_are_told_at_once(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        data.build([], tmp_path / "set", validation=1.0, shard_bytes=5)
    assert len(caught.value.problems) == 2


def test_no_text_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="no text"):
        data.build([data.Document("a", " ", "s", "l")], tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_lone_surrogates_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"U\+D800 at character 2"):
        data.build([data.Document("odd", "ab\ud800", "s", "l")], tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [0, 1000, 70_000, 200_000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, documents, monkeypatch: pytest.MonkeyPatch, room: int):
    class Full(io.FileIO):
        left = room

        def write(self, content) -> int:
            Full.left -= len(content)
            if Full.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    class Opened(shards._File):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.file.close()
            path.unlink()
            self.file = Full(path, "x")

    monkeypatch.setattr(shards, "_File", Opened)
    with pytest.raises(UserError, match="disk is full"):
        data.build(documents(), tmp_path / "set", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from tozan import data\n"
        "def texts():\n"
        "    for n in range(10**9):\n"
        "        if n == 500: print('under way', flush=True)\n"
        "        yield data.Document(str(n), f'text {n} ' * 50, 's', 'l')\n"
        "data.build(texts(), Path(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "set")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"under way\n"
    other = tmp_path / "other"
    data.build([data.Document("a", "text of another", "s", "l")], other, vocabulary=257, validation=0)
    assert not (tmp_path / "set").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    leftovers = list(tmp_path.glob(".set.building-*"))
    assert len(leftovers) == 1
    assert not list(leftovers[0].rglob("manifest.json"))
    data.build([data.Document("a", "text", "s", "l")], tmp_path / "set", vocabulary=257, validation=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "set"]


def test_the_scratch_folder_of_a_living_build_is_left_alone(tmp_path: Path):
    with staging.staging(tmp_path / "set") as first, staging.staging(tmp_path / "set") as second:
        assert first.exists()
        assert second.exists()
        assert first != second
    assert list(tmp_path.iterdir()) == []


def test_building_is_fast_enough_for_the_demo(tmp_path: Path):
    begin = time.process_time()
    text = data.build(data.corpus.standard_library(limit=2_000_000), tmp_path / "set", vocabulary=1024)
    assert text.splits["train"].bytes > 1_000_000
    assert time.process_time() - begin < 40
