"""Documents in tar shards against one file each: inodes, opens, latency of random reads, throughput.

Every reader gets the same documents' tokens (16-bit) in the same random order, and what it returns is compared with
what was written. "Cold" means that the page cache was told to forget the files (posix_fadvise DONTNEED; the kernel's
whole cache, directories and inodes included, if that is asked for, which takes root). What a virtual disk has cached
on its host stays cached, and is not ours to drop.
"""

from __future__ import annotations

import os
import random
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tozan import data, files
from tozan.amounts import scaled
from tozan.bench import measure
from tozan.bench.result import Result, Row
from tozan.bench.show import foot, head, table
from tozan.data.manifest import Manifest
from tozan.data.reader import Shard

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r", "st")]
Read = Callable[[int], Any]
"""Gives a document's tokens by its number."""


@dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
        documents: how many are made.
        size: bytes of text in each, roughly.
        shard_bytes: bytes of a shard, roughly.
        samples: samples read through `data.Dataset`, of 1,025 tokens.
        passes: warm passes over all documents, after the cold one.
        drop: also drop the kernel's caches before the cold pass (root only).
        folder: where files are written and removed again; None: the system's temporary folder.
    """

    documents: int = 20_000
    size: int = 3_000
    shard_bytes: int = 8 << 20
    samples: int = 5_000
    passes: int = 6
    drop: bool = False
    folder: Path | None = None


class Readers:
    """The contestants over one data set, in `<folder>/set` and `<folder>/files`.

    Attributes:
        opens: files opened so far.
    """

    def __init__(self, folder: Path) -> None:
        self.set = folder / "set"
        self.loose = folder / "files"
        self.manifest = Manifest.read(self.set)
        self.entries = self.manifest.of("train")
        self.where = [(shard, n) for shard, entry in enumerate(self.entries) for n in range(entry.documents)]
        self.opens = 0

    def path(self, number: int) -> Path:
        """The loose file of a document, in folders of 1,000."""
        return self.loose / f"{number // 1000:03d}" / f"{number:06d}"

    def files(self) -> Read:
        """One file for each document."""

        def read(number: int) -> Any:
            self.opens += 1
            return np.fromfile(self.path(number), dtype="<u2")

        return read

    def shards(self) -> Read:
        """Tozan's index and positioned reads; header and checksum are verified when a member is first read."""
        opened: dict[int, Shard] = {}

        def read(number: int) -> Any:
            shard, member = self.where[number]
            if shard not in opened:
                self.opens += 2
                entry = self.entries[shard]
                opened[shard] = Shard(self.set, entry, self.manifest, bytearray(entry.documents))
            start = opened[shard].index.start
            return opened[shard].tokens(member, 0, int(start[member + 1]) - int(start[member]) - 1)

        return read

    def tar_members(self) -> Read:
        """Python's tarfile, each archive opened once and its list of members kept."""
        opened: dict[int, tarfile.TarFile] = {}

        def read(number: int) -> Any:
            shard, member = self.where[number]
            if shard not in opened:
                self.opens += 1
                opened[shard] = tarfile.open(self.set / self.entries[shard].name)  # noqa: SIM115
                opened[shard].getmembers()
            name = f"{self.entries[shard].name.removesuffix('.tar')}-{member:07d}.tokens"
            file = opened[shard].extractfile(name)
            assert file is not None
            return np.frombuffer(file.read(), dtype="<u2")

        return read


def run(work: Work) -> Result:
    """Write the documents in both forms, read them in all ways, remove them."""
    with files.scratch("tozan-io-", work.folder) as folder:
        made = documents(work.documents, work.size)
        data.build(made, folder / "set", vocabulary=1024, validation=0, shard_bytes=work.shard_bytes)
        readers = Readers(folder)
        write_loose(readers)
        order = random.Random(1).sample(range(len(readers.where)), len(readers.where))
        rows = _random_reads(readers, order, work) + _front_to_back(readers, work.passes) + _samples(readers, work)
    options = vars(work) | {"folder": str(work.folder) if work.folder else None}
    return measure.made("io", rows, options, notes=[" ".join((__doc__ or "").split("\n\n")[1].split())])


def documents(count: int, size: int) -> Iterator[data.Document]:
    """Made-up texts of about `size` bytes."""
    chance = random.Random(0)
    for number in range(count):
        text = " ".join(chance.choices(WORDS, k=size // 3))
        yield data.Document(f"{number:06d}", f"{number} {text}"[:size], "made", "CC0-1.0")


def write_loose(readers: Readers) -> None:
    """The same tokens, one file each."""
    read = readers.shards()
    for number in range(len(readers.where)):
        readers.path(number).parent.mkdir(parents=True, exist_ok=True)
        readers.path(number).write_bytes(read(number).tobytes())


def used(folder: Path) -> tuple[int, int]:
    """Inodes (folders among them) and bytes on disk."""
    paths = [folder, *folder.rglob("*")]
    return len(paths), sum(path.lstat().st_blocks * 512 for path in paths)


def _random_reads(readers: Readers, order: Sequence[int], work: Work) -> list[Row]:
    contestants = {"one file each": readers.files, "tar shards, index": readers.shards, "tarfile": readers.tar_members}
    expected, rows = readers.shards(), []
    for name, make in contestants.items():
        check = make()
        wrong = [number for number in order[:500] if not np.array_equal(check(number), expected(number))]
        if wrong:
            raise RuntimeError(f"{name} gives other tokens than were written for documents {wrong[:5]}")
        folder = readers.loose if name == "one file each" else readers.set
        _forget(folder, work.drop)
        readers.opens, read = 0, make()
        passes = {"cold": [_latencies(read, order)]}
        opens = readers.opens
        passes["warm"] = [_latencies(read, order) for _ in range(work.passes)]
        inodes, disk = used(folder)
        for state, latencies in passes.items():
            p50, p99 = np.percentile(np.concatenate(latencies), [50, 99])
            rates = [len(order) / float(one.sum()) for one in latencies]
            own = {"reader": name, "state": state, "opens": opens, "inodes": inodes, "disk_bytes": disk}
            rows.append(Row.of(f"{name}, {state}", "1/s", rates, p50_seconds=float(p50), p99_seconds=float(p99), **own))
    return rows


def _latencies(read: Read, order: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Seconds of each read."""
    found = np.empty(len(order))
    for position, number in enumerate(order):
        before = time.perf_counter()
        read(number)
        found[position] = time.perf_counter() - before
    return found


def _forget(folder: Path, drop: bool) -> None:
    """Tell the page cache to forget a folder's files."""
    for path in filter(Path.is_file, folder.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    if drop:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


def _front_to_back(readers: Readers, passes: int) -> list[Row]:
    """Documents/s of what can only be read in order."""
    streams = {"tarfile, streamed": _tar_stream}
    if find_spec("webdataset"):
        streams["webdataset, streamed"] = _webdataset_stream
    rows = []
    for name, stream in streams.items():
        rates = []
        for _ in range(passes):
            begin = time.perf_counter()
            count = sum(len(tokens) > 0 for tokens in stream(readers))
            rates.append(count / (time.perf_counter() - begin))
        rows.append(Row.of(name, "1/s", rates, reader=name, state="warm"))
    return rows


def _tar_stream(readers: Readers) -> Iterator[Any]:
    for entry in readers.entries:
        with tarfile.open(readers.set / entry.name, "r|") as archive:
            for member in archive:
                file = archive.extractfile(member)
                if member.name.endswith(".tokens") and file is not None:
                    yield np.frombuffer(file.read(), dtype="<u2")


def _webdataset_stream(readers: Readers) -> Iterator[Any]:
    webdataset = import_module("webdataset")
    urls = [str(readers.set / entry.name) for entry in readers.entries]
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        yield np.frombuffer(sample["tokens"], dtype="<u2")


def _samples(readers: Readers, work: Work) -> list[Row]:
    """Samples/s through the reader that training uses, at any place of the order."""
    rows = []
    dataset = data.Dataset.open(readers.set, "train", sequence=1024, seed=0)
    dataset.samples(0, dataset.windows)
    for batch in (1, 8):
        count = max(1, work.samples // work.passes // batch)
        for where, first in (("start", 0), ("far", 10**12)):
            rates = []
            for part in range(work.passes):
                begin = time.perf_counter()
                for number in range(count):
                    dataset.samples(first + (part * count + number) * batch, batch)
                rates.append(count * batch / (time.perf_counter() - begin))
            name = f"samples of 1,025 tokens, {batch} at a time, {where}"
            rows.append(Row.of(name, "1/s", rates, reader="tozan.data.Dataset", state="warm"))
    return rows


def page(result: Result) -> list[object]:
    """What `tozan bench io` prints."""
    lines = []
    for row in result.rows:
        latency = [scaled(row[key], "s") if row.get(key) is not None else "—" for key in ("p50_seconds", "p99_seconds")]
        counts = [f"{row[key]:,}" if row.get(key) is not None else "—" for key in ("inodes", "opens")]
        spread = f"{row.low:,.0f} to {row.high:,.0f}"
        lines.append((row.name, f"{row.median:,.0f}", spread, *latency, *counts))
    headings = ("reader", "reads/s", "spread", "p50", "p99", "inodes", "opens")
    return [head(result), table(headings, lines), foot(result)]
