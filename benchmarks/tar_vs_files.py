"""Documents as one file each against documents in tar shards: inodes, opens, latency of random reads, samples/s.

    python benchmarks/tar_vs_files.py [--documents 20000] [--bytes 3000] [--folder DIR] [--out RESULTS.json]

Every reader gets the same documents' tokens (16-bit) in the same random order, and every payload it returns is
compared with what was written. "Cold" means that the page cache was told to forget the files (posix_fadvise
DONTNEED; and the kernel's whole cache as well, directories and inodes included, if the benchmark may do that, which
takes root and --drop-caches). What a virtual disk has cached on its host stays cached, and is not ours to drop.
"""

import argparse
import json
import os
import platform
import random
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tozan import data
from tozan.data.manifest import Manifest
from tozan.data.reader import Shard

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r", "st")]


def documents(count: int, size: int) -> Iterator[data.Document]:
    """Made-up texts of about `size` bytes."""
    chance = random.Random(0)
    for number in range(count):
        words = chance.choices(WORDS, k=size // 3)
        yield data.Document(f"{number:06d}", f"{number} " + " ".join(words)[:size], "made", "CC0-1.0")


class Readers:
    """The contestants: each gives document number n of the train split as tokens."""

    def __init__(self, folder: Path) -> None:
        self.set = folder / "set"
        self.loose = folder / "files"
        self.manifest = Manifest.read(self.set)
        self.entries = self.manifest.of("train")
        self.where = [(shard, n) for shard, entry in enumerate(self.entries) for n in range(entry.documents)]
        self.opens = 0

    def name(self, number: int) -> str:
        shard, member = self.where[number]
        return f"{self.entries[shard].name.removesuffix('.tar')}-{member:07d}.tokens"

    def files(self) -> Callable[[int], Any]:
        """One file for each document, in folders of 1,000."""

        def read(number: int) -> Any:
            self.opens += 1
            return np.fromfile(self.loose / f"{number // 1000:03d}" / f"{number:06d}", dtype="<u2")

        return read

    def shards(self) -> Callable[[int], Any]:
        """Our index and positioned reads, with the header and checksum verified when a member is first read."""
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

    def tar_members(self) -> Callable[[int], Any]:
        """Python's tarfile, each archive opened once and its list of members kept."""
        opened: dict[int, tarfile.TarFile] = {}

        def read(number: int) -> Any:
            shard = self.where[number][0]
            if shard not in opened:
                self.opens += 1
                opened[shard] = tarfile.open(self.set / self.entries[shard].name)  # noqa: SIM115
                opened[shard].getmembers()
            file = opened[shard].extractfile(self.name(number))
            assert file is not None
            return np.frombuffer(file.read(), dtype="<u2")

        return read


def forget(folder: Path, drop: bool) -> None:
    """Tells the page cache to forget a folder's files."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
    if drop:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


def timed(read: Callable[[int], Any], order: list[int]) -> dict[str, float]:
    """Reads/s and the latency of each read in microseconds."""
    latencies = np.empty(len(order))
    begin = time.perf_counter()
    for position, number in enumerate(order):
        before = time.perf_counter()
        read(number)
        latencies[position] = time.perf_counter() - before
    seconds = time.perf_counter() - begin
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e6
    return {"reads_per_second": len(order) / seconds, "p50_us": p50, "p99_us": p99, "first_us": latencies[0] * 1e6}


def write_loose(folder: Path, readers: Readers) -> None:
    """The same tokens, one file each."""
    read = readers.shards()
    for number in range(len(readers.where)):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read(number).tobytes())


def sequential(readers: Readers) -> dict[str, float]:
    """Documents per second of those that can only be read from front to back, once through."""
    found = {}
    begin = time.perf_counter()
    count = 0
    for entry in readers.entries:
        with tarfile.open(readers.set / entry.name, "r|") as archive:
            for member in archive:
                file = archive.extractfile(member)
                if member.name.endswith(".tokens") and file is not None:
                    count += len(np.frombuffer(file.read(), dtype="<u2")) > 0
    found["tarfile, streamed"] = count / (time.perf_counter() - begin)
    try:
        import webdataset
    except ImportError:
        return found
    urls = [str(readers.set / entry.name) for entry in readers.entries]
    begin = time.perf_counter()
    count = sum(
        len(np.frombuffer(sample["tokens"], dtype="<u2")) > 0
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    )
    found["webdataset, streamed"] = count / (time.perf_counter() - begin)
    return found


def used(folder: Path) -> dict[str, int]:
    """Inodes (folders among them) and bytes on disk."""
    paths = [folder, *folder.rglob("*")]
    return {"inodes": len(paths), "disk_bytes": sum(path.lstat().st_blocks * 512 for path in paths)}


def measure(readers: Readers, samples: int, drop: bool) -> dict[str, Any]:
    """All figures."""
    order = random.Random(1).sample(range(len(readers.where)), len(readers.where))
    result: dict[str, Any] = {"random": {}, "inodes": {"files": used(readers.loose), "shards": used(readers.set)}}
    contestants = {"one file each": readers.files, "tar shards, index": readers.shards, "tarfile": readers.tar_members}
    expected = readers.shards()
    for name, make in contestants.items():
        check = make()
        assert all(np.array_equal(check(number), expected(number)) for number in order[:500])
        folder = readers.loose if name == "one file each" else readers.set
        forget(folder, drop)
        readers.opens = 0
        read = make()
        cold = timed(read, order)
        warm = [timed(read, order) for _ in range(3)]
        best = max(warm, key=lambda run: run["reads_per_second"])
        result["random"][name] = {"opens_first_pass": 0, "cold": cold, "warm": best}
        readers.opens = 0
        timed(make(), order)
        result["random"][name]["opens_first_pass"] = readers.opens
    result["front to back, documents/s"] = sequential(readers)
    for batch in (1, 8):
        dataset = data.Dataset.open(readers.set, "train", sequence=1024, seed=0)
        dataset.samples(0, dataset.windows)
        begin = time.perf_counter()
        for first in range(0, samples, batch):
            dataset.samples(first, batch)
        result[f"samples/s of 1,025 tokens, batches of {batch}"] = samples / (time.perf_counter() - begin)
        times = []
        for first in (0, 10**12):
            begin = time.perf_counter()
            for number in range(200):
                dataset.samples(first + number, 1)
            times.append((time.perf_counter() - begin) / 200 * 1e6)
        result["us per sample near 0 and near 10^12"] = times
    return result


def table(result: dict[str, Any]) -> str:
    """The figures for a terminal."""
    half = f"{'p50 us':>9}{'p99 us':>9}"
    lines = [f"{'random reads':<20}{'opens':>8}{'cold/s':>10}{half}{'warm/s':>10}{half}"]
    for name, row in result["random"].items():
        cold, warm = row["cold"], row["warm"]
        numbers = [cold["reads_per_second"], cold["p50_us"], cold["p99_us"]]
        numbers += [warm["reads_per_second"], warm["p50_us"], warm["p99_us"]]
        texts = [f"{number:,.0f}" if number >= 100 else f"{number:.1f}" for number in numbers]
        widths = (10, 9, 9, 10, 9, 9)
        opens = f"{row['opens_first_pass']:>8,}"
        lines.append(f"{name:<20}{opens}" + "".join(f"{t:>{w}}" for t, w in zip(texts, widths, strict=True)))
    for key, value in result.items():
        if key != "random":
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join(lines)


def main() -> None:
    """Builds, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--bytes", type=int, default=3_000)
    parser.add_argument("--samples", type=int, default=5_000)
    parser.add_argument("--shard-bytes", type=int, default=8 << 20)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: a temporary folder")
    parser.add_argument("--drop-caches", action="store_true", help="also drop the kernel's caches (root only)")
    parser.add_argument("--out", type=Path, default=Path("tar_vs_files.json"))
    given = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="tar-vs-files-", dir=given.folder))
    try:
        made = documents(given.documents, given.bytes)
        data.build(made, scratch / "set", vocabulary=1024, validation=0, shard_bytes=given.shard_bytes)
        readers = Readers(scratch)
        write_loose(scratch / "files", readers)
        result = measure(readers, given.samples, given.drop_caches)
    finally:
        shutil.rmtree(scratch)
    result["of"] = {
        "documents": given.documents,
        "bytes": given.bytes,
        "machine": platform.platform(),
        "load": os.getloadavg(),
    }
    given.out.write_text(json.dumps(result, indent=1))
    print(table(result))


if __name__ == "__main__":
    main()
