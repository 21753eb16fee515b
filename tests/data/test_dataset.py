"""Samples against a plain reference that reads the shards with `tarfile` and does the same arithmetic naively."""

import json
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tozan import data
from tozan.data import order
from tozan.errors import UserError


def stream(folder: Path, split: str) -> np.ndarray:
    """All tokens of a split, read member by member in the tar's own order."""
    manifest = json.loads((folder / "manifest.json").read_text())
    found = []
    for shard in manifest["shards"]:
        if shard["split"] == split:
            with tarfile.open(folder / shard["name"]) as archive:
                for member in archive:
                    if member.name.endswith(".tokens"):
                        payload = archive.extractfile(member).read()
                        found += [*np.frombuffer(payload, dtype="<u2").tolist(), manifest["end"]]
    return np.array(found)


@pytest.fixture(scope="module")
def reference(built: Path) -> dict[str, np.ndarray]:
    return {split: stream(built, split) for split in ("train", "validation")}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("sequence", [1, 7, 64, 1000])
def test_samples_equal_the_naive_reading(built: Path, reference: dict, split: str, sequence: int):
    tokens = reference[split]
    with data.Dataset.open(built, split, sequence=sequence, seed=11) as dataset:
        assert dataset.tokens == len(tokens)
        assert dataset.windows == len(tokens) // sequence
        for first in (0, dataset.windows - 2, 10**12):
            starts = order.starts(first, 5, windows=dataset.windows, sequence=sequence, seed=11)
            expected = [np.take(tokens, np.arange(s, s + sequence + 1), mode="wrap") for s in starts]
            np.testing.assert_array_equal(dataset.samples(first, 5), expected)


def test_an_epoch_trains_on_every_window(built: Path, reference: dict):
    tokens = reference["validation"]
    dataset = data.Dataset.open(built, "validation", sequence=50, seed=2)
    inputs = dataset.samples(0, dataset.windows)[:, :-1]
    phase = order.starts(0, 1, windows=dataset.windows, sequence=50, seed=2)[0] % 50
    expected = np.take(tokens, np.arange(phase, phase + dataset.windows * 50), mode="wrap").reshape(-1, 50)
    assert sorted(map(tuple, inputs.tolist())) == sorted(map(tuple, expected.tolist()))


def test_in_order_is_the_beginning_of_the_stream(built: Path, reference: dict):
    dataset = data.Dataset.open(built, "validation", sequence=40, seed=2)
    tokens = reference["validation"]
    whole = dataset.in_order(10**9)
    assert len(whole) == (len(tokens) - 1) // 40
    np.testing.assert_array_equal(whole[:, :-1].ravel(), tokens[: len(whole) * 40])
    np.testing.assert_array_equal(whole[:, 1:].ravel(), tokens[1 : len(whole) * 40 + 1])
    np.testing.assert_array_equal(dataset.in_order(3), whole[:3])


@given(first=st.integers(0, 2**50), cuts=st.lists(st.integers(0, 24), max_size=3), ranks=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_neither_batches_nor_ranks_change_samples(built: Path, first: int, cuts: list[int], ranks: int):
    dataset = data.Dataset.open(built, "train", sequence=16, seed=7)
    whole = dataset.samples(first, 24)
    edges = [0, *sorted(cuts), 24]
    parts = [dataset.samples(first + a, b - a) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    for rank in range(ranks):
        own = [
            data.Dataset.open(built, "train", sequence=16, seed=7).samples(first + n, 1)[0]
            for n in range(rank, 6, ranks)
        ]
        np.testing.assert_array_equal(own, whole[rank:6:ranks])


def test_threads_get_the_same_samples(built: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = data.Dataset.open(built, "train", sequence=32, seed=0)
    monkeypatch.setattr(dataset, "_open_limit", 1)  # shards leave the cache while others read them
    expected = data.Dataset.open(built, "train", sequence=32, seed=0).samples(0, 400)
    start = threading.Barrier(8)

    def read(worker: int) -> np.ndarray:
        start.wait()
        return np.concatenate([dataset.samples(first, 5) for first in range(worker * 50, worker * 50 + 50, 5)])

    with ThreadPoolExecutor(8) as pool:
        np.testing.assert_array_equal(np.concatenate(list(pool.map(read, range(8)))), expected)


def test_far_samples_touch_no_more_than_near_ones(built: Path, monkeypatch: pytest.MonkeyPatch):
    """The work is counted, not timed: calls of the permutation, and bytes read."""
    work = []
    permute = order.permute
    monkeypatch.setattr(
        order, "permute", lambda positions, *rest: work.append(len(positions)) or permute(positions, *rest)
    )
    dataset = data.Dataset.open(built, "train", sequence=32, seed=0)
    dataset.samples(0, 1)
    dataset.samples(10**12, 1)
    dataset.samples(10**15 + 7, 1)
    assert work == [1, 1, 1]


def test_facts_for_the_trainer(built: Path):
    dataset = data.Dataset.open(built, "train", sequence=32, seed=0)
    manifest = json.loads((built / "manifest.json").read_text())
    tokenizer = data.Tokenizer.load(dataset.tokenizer_json)
    assert dataset.vocabulary == tokenizer.size == manifest["vocabulary"]
    assert dataset.tokenizer_sha256 == tokenizer.sha256
    text = sum(s["bytes"] for s in manifest["shards"] if s["split"] == "train")
    assert dataset.bytes_per_token == text / dataset.tokens
    assert dataset.samples(0, 0).shape == (0, 33)
    assert dataset.samples(0, 2).dtype == np.int64
    assert dataset.skipped == 0
    dataset.close()
    assert dataset.samples(0, 1).shape == (1, 33)


def test_every_document_is_in_exactly_one_split(built: Path, documents):
    tokenizer = data.Tokenizer.load(built / "tokenizer.json")
    texts = []
    for split in ("train", "validation"):
        tokens = stream(built, split)
        ends = np.flatnonzero(tokens == tokenizer.end)
        texts += [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]
    assert sorted(texts) == sorted(document.text for document in documents())


@pytest.mark.parametrize("sequence", [10**6, 10**12])
def test_splits_shorter_than_a_sample_are_refused(built: Path, sequence: int):
    with pytest.raises(UserError, match=f"{sequence + 1:,}"):
        data.Dataset.open(built, "train", sequence=sequence, seed=0)


def test_a_split_of_exactly_one_sample(tmp_path: Path):
    data.build([data.Document("a", "abcdefg", "s", "l")], tmp_path / "set", vocabulary=257, validation=0)
    dataset = data.Dataset.open(tmp_path / "set", "train", sequence=7, seed=0)
    assert dataset.windows == 1
    assert len({tuple(sorted(sample)) for sample in dataset.samples(0, 9).tolist()}) == 1
    with pytest.raises(UserError, match="9"):
        data.Dataset.open(tmp_path / "set", "train", sequence=8, seed=0)
    with pytest.raises(UserError, match="validation"):
        data.Dataset.open(tmp_path / "set", "validation", sequence=2, seed=0)


def test_wide_vocabularies_are_stored_in_four_bytes(tmp_path: Path, documents):
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 70_000, **{letter: 69_000 + i for i, letter in enumerate(letters)}}
    library = Library(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.save(str(tmp_path / "wide.json"))
    manifest = data.build(documents(9), tmp_path / "set", tokenizer=tmp_path / "wide.json", validation=0)
    assert (manifest.dtype, manifest.vocabulary) == ("uint32", 70_001)
    dataset = data.Dataset.open(tmp_path / "set", "train", sequence=20, seed=0)
    sample = dataset.samples(0, 4)
    assert sample.min() >= 69_000
    assert data.verify(tmp_path / "set") == []
