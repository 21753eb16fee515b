"""Everything that can be wrong with a data set: each is named by open, read or verify; none is read as data."""

import json
import random
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from tozan import data
from tozan.data import Dataset, Manifest
from tozan.errors import Problem, UserError

SHARD, OTHER = "train-00000.tar", "train-00001.tar"
INDEX, OTHER_INDEX = "train-00000.index.safetensors", "train-00001.index.safetensors"
VICTIM = 3
"""Number of the document that is damaged."""


def columns(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(folder / INDEX, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def patch(path: Path, at: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(new)] = new
    path.write_bytes(content)


def flip(path: Path, at: int, bit: int = 3) -> None:
    patch(path, at, bytes([path.read_bytes()[at] ^ (1 << bit)]))


def payload_at(folder: Path) -> int:
    return int(columns(folder)[0]["offset"][VICTIM])


def reseal(folder: Path) -> None:
    """Makes the manifest agree with what now lies in the first shard and its index, as a hostile writer would."""
    manifest = Manifest.read(folder)
    first, *rest = manifest.shards
    tar, index = (folder / SHARD).read_bytes(), (folder / INDEX).read_bytes()
    first = first.model_copy(
        update={
            "size": len(tar),
            "sha256": sha256(tar).hexdigest(),
            "index_size": len(index),
            "index_sha256": sha256(index).hexdigest(),
        }
    )
    (folder / "manifest.json").write_bytes(manifest.model_copy(update={"shards": [first, *rest]}).to_json())


def header(**fields: object) -> Callable[[Path], None]:
    """A valid tar header with other fields in the victim's place, in a data set whose hashes all agree with it."""

    def damage(folder: Path) -> None:
        at = payload_at(folder) - 512
        member = tarfile.TarInfo.frombuf((folder / SHARD).read_bytes()[at : at + 512], "utf-8", "strict")
        for field, value in fields.items():
            setattr(member, field, value)
        patch(folder / SHARD, at, member.tobuf(tarfile.GNU_FORMAT)[:512])
        reseal(folder)

    return damage


def beyond_the_vocabulary(folder: Path) -> None:
    index, metadata = columns(folder)
    at = int(index["offset"][VICTIM])
    size = 2 * int(index["start"][VICTIM + 1] - index["start"][VICTIM] - 1)
    patch(folder / SHARD, at, b"\xff\xff")
    index["crc"][VICTIM] = zlib.crc32((folder / SHARD).read_bytes()[at : at + size])
    (folder / INDEX).write_bytes(save(index, metadata))
    reseal(folder)


def index_column(name: str, value: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index, metadata = columns(folder)
        index[name][VICTIM] = value
        (folder / INDEX).write_bytes(save(index, metadata))
        reseal(folder)

    return damage


def of_another_tokenizer(folder: Path) -> None:
    """The first shard comes from a data set of the same documents with another vocabulary."""
    out = folder.parent / "other"
    chosen = [data.Document(f"o{i}", f"other text {i} " * 300, "s", "l") for i in range(99)]
    data.build(chosen, out, vocabulary=300, shard_bytes=1 << 16, validation=0.2)
    for name in (SHARD, INDEX):
        shutil.copy(out / name, folder / name)
    reseal(folder)


def swapped(*pairs: tuple[str, str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for one, two in pairs:
            (folder / one).rename(folder / "aside")
            (folder / two).rename(folder / one)
            (folder / "aside").rename(folder / two)

    return damage


def swapped_and_resealed(folder: Path) -> None:
    """Equal lengths in the manifest, as if the two shards happened to be equally long."""
    swapped((SHARD, OTHER), (INDEX, OTHER_INDEX))(folder)
    reseal(folder)


def tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(data.Tokenizer.train(["a b c"], 257).json)


def linked(folder: Path) -> None:
    shutil.move(folder / SHARD, folder.parent / SHARD)
    (folder / SHARD).symlink_to(folder.parent / SHARD)


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


@dataclass
class Case:
    """A damage, what must be said of it, and whether training is to be able to leave it out."""

    damage: Callable[[Path], None]
    says: str
    names: str = SHARD
    skippable: bool = True
    harms_reading: bool = True


MEMBER = f"{SHARD}:train-00000-{VICTIM:07d}"
CASES = {
    "truncated": Case(truncate(SHARD, 9_000), "truncated"),
    "truncated and resealed": Case(lambda f: (truncate(SHARD, 9_000)(f), reseal(f))[0], "outside", INDEX),
    "empty": Case(truncate(SHARD, 0), "truncated: 0 bytes"),
    "too long": Case(lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + bytes(512)), "too long"),
    "missing": Case(lambda f: (f / SHARD).unlink(), "No such file"),
    "a folder": Case(lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir())[0], "not a regular file"),
    "a link": Case(linked, "not a regular file"),
    "payload flipped": Case(lambda f: flip(f / SHARD, payload_at(f) + 5), "CRC-32", MEMBER),
    "header flipped": Case(lambda f: flip(f / SHARD, payload_at(f) - 512 + 2), "header is damaged", MEMBER),
    "header zeroed": Case(lambda f: patch(f / SHARD, payload_at(f) - 512, bytes(512)), "header is damaged", MEMBER),
    "parent name": Case(header(name="../escape.tokens"), r"'\.\./escape\.tokens' leaves the folder", MEMBER),
    "inner parent name": Case(header(name="a/../../escape"), "leaves the folder", MEMBER),
    "absolute name": Case(header(name="/etc/passwd"), "'/etc/passwd' is absolute", MEMBER),
    "another name": Case(header(name="train-00000-0000007.tokens"), "is called", MEMBER),
    "symbolic link": Case(header(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "symbolic link", MEMBER),
    "hard link": Case(header(type=tarfile.LNKTYPE, linkname="other"), "hard link", MEMBER),
    "character device": Case(header(type=tarfile.CHRTYPE), "character device", MEMBER),
    "block device": Case(header(type=tarfile.BLKTYPE), "block device", MEMBER),
    "pipe": Case(header(type=tarfile.FIFOTYPE), "pipe", MEMBER),
    "folder member": Case(header(type=tarfile.DIRTYPE), "folder", MEMBER),
    "absurd size": Case(header(size=8 << 30), "8,589,934,592 bytes", MEMBER),
    "absurder size": Case(header(size=1 << 60), "1,152,921,504,606,846,976 bytes", MEMBER),
    "token beyond": Case(beyond_the_vocabulary, "65,535, beyond the vocabulary of 400", MEMBER),
    "index missing": Case(lambda f: (f / INDEX).unlink(), "No such file", INDEX),
    "index truncated": Case(truncate(INDEX, 100), "truncated", INDEX),
    "index empty": Case(truncate(INDEX, 0), "truncated: 0 bytes", INDEX),
    "index empty and resealed": Case(lambda f: (truncate(INDEX, 0)(f), reseal(f))[0], "cannot be read", INDEX),
    "index flipped": Case(lambda f: flip(f / INDEX, (f / INDEX).stat().st_size - 9), "SHA-256", INDEX),
    "index header flipped": Case(lambda f: patch(f / INDEX, 8, b"@"), "no index", INDEX),
    "index offset wild": Case(index_column("offset", 2**63 + 5), "points outside", INDEX),
    "index offset wrong": Case(index_column("offset", 512 + 1024), "", MEMBER),
    "index start wild": Case(index_column("start", 2**64 - 1), "does not add up", INDEX),
    "shards swapped": Case(
        swapped((SHARD, OTHER)), "is called 'train-0000|header is damaged|the manifest says", "train-0000"
    ),
    "both swapped": Case(swapped((SHARD, OTHER), (INDEX, OTHER_INDEX)), "the manifest says", "train-0000"),
    "swapped and resealed": Case(swapped_and_resealed, "belongs to shard train-00001|the manifest says", "train-0000"),
    "another tokenizer": Case(of_another_tokenizer, "belongs to tokenizer_sha256", INDEX),
    "tokenizer replaced": Case(tokenizer, "another tokenizer", "tokenizer.json", skippable=False),
    "tokenizer missing": Case(
        lambda f: (f / "tokenizer.json").unlink(), "No such file", "tokenizer.json", skippable=False
    ),
    "manifest flipped": Case(lambda f: flip(f / "manifest.json", 300), "damaged", "manifest.json", skippable=False),
    "manifest cut": Case(truncate("manifest.json", 300), "damaged", "manifest.json", skippable=False),
    "manifest missing": Case(
        lambda f: (f / "manifest.json").unlink(), "no finished data set", "manifest.json", skippable=False
    ),
    "manifest of the future": Case(
        lambda f: (f / "manifest.json").write_text('{"format": "tozan-data", "version": 2}'),
        "version 2",
        "manifest.json",
        skippable=False,
    ),
    "manifest of another kind": Case(
        lambda f: (f / "manifest.json").write_text("[1, 2]"), "not the manifest", "manifest.json", skippable=False
    ),
    "padding flipped": Case(lambda f: flip(f / SHARD, (f / SHARD).stat().st_size - 7), "outside", harms_reading=False),
}


def mentioned(problems: list[Problem], case: Case) -> bool:
    return any(case.names in problem.where and re.search(case.says, problem.what) for problem in problems)


def read_all(folder: Path, on_bad: str = "refuse", verify: str = "members") -> tuple[np.ndarray, Dataset]:
    dataset = Dataset.open(folder, "train", sequence=256, seed=1, verify=verify, on_bad=on_bad)
    return dataset.samples(0, dataset.windows), dataset


@pytest.fixture(scope="module")
def whole(built: Path) -> tuple[np.ndarray, set[tuple[int, ...]]]:
    samples = read_all(built)[0]
    return samples, set(map(tuple, samples.tolist()))


@pytest.mark.parametrize("name", CASES)
def test_verify_names_the_damage(copy: Path, name: str):
    CASES[name].damage(copy)
    problems = data.verify(copy)
    assert mentioned(problems, CASES[name]), problems


@pytest.mark.parametrize("name", CASES)
def test_reading_refuses_the_damage(copy: Path, name: str, whole: tuple):
    case = CASES[name]
    case.damage(copy)
    if case.harms_reading:
        with pytest.raises(UserError) as caught:
            read_all(copy)
        assert mentioned(caught.value.problems, case), caught.value
    else:
        np.testing.assert_array_equal(read_all(copy)[0], whole[0])
    with pytest.raises(UserError) as caught:
        Dataset.open(copy, "train", sequence=256, seed=1, verify="full")
    assert mentioned(caught.value.problems, case), caught.value


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.skippable])
def test_skipping_replaces_samples_by_good_ones(copy: Path, name: str, whole: tuple):
    case = CASES[name]
    case.damage(copy)
    samples, dataset = read_all(copy, "skip")
    changed = (samples != whole[0]).any(axis=1).sum()
    assert dataset.skipped == changed
    assert (changed > 0) == case.harms_reading
    # Same phase in the first epoch, so each stand-in is another window of the undamaged data set.
    assert set(map(tuple, samples.tolist())) <= whole[1]
    if case.harms_reading:
        assert mentioned(list(dataset.problems.values()), case), dataset.problems
    apart = Dataset.open(copy, "train", sequence=256, seed=1, on_bad="skip")
    again = [apart.samples(number, 1)[0] for number in reversed(range(60))]
    np.testing.assert_array_equal(again[::-1], samples[:60])
    assert len(apart.in_order(10**6)) <= dataset.windows


def test_a_lost_data_set_does_not_search_for_ever(copy: Path):
    for shard in copy.glob("train-*.tar"):
        shard.write_bytes(b"")
    dataset = Dataset.open(copy, "train", sequence=256, seed=1, on_bad="skip")
    with pytest.raises(UserError, match="too much is damaged"):
        dataset.samples(0, 1)
    assert len(dataset.in_order(5)) == 0


def test_all_damages_are_told_at_once(copy: Path):
    shards = sorted(copy.glob("train-*.tar"))
    for shard in shards:
        shard.unlink()
    with pytest.raises(UserError) as caught:
        Dataset.open(copy, "train", sequence=256, seed=1)
    assert len(caught.value.problems) == len(shards) > 1


def test_a_file_that_shrinks_while_it_is_read_is_named(copy: Path):
    dataset = Dataset.open(copy, "train", sequence=256, seed=1)
    dataset.samples(0, 1)
    for shard in copy.glob("train-*.tar"):
        shard.write_bytes(b"")
    with pytest.raises(UserError, match="truncated"):
        dataset.samples(0, dataset.windows)


def test_random_damage_is_never_read_as_data(built: Path, tmp_path: Path, whole: tuple):
    """100 random damages: samples are right or refused by name, and verify finds each one."""
    chance = random.Random(5)
    files = sorted(path.name for path in built.iterdir() if not path.name.startswith("validation"))
    for number in range(100):
        folder = Path(shutil.copytree(built, tmp_path / str(number)))
        path = folder / chance.choice(files)
        content = bytearray(path.read_bytes())
        at = chance.randrange(len(content))
        kind = chance.choice(["flip", "zero", "cut", "insert", "noise"])
        if kind == "flip":
            content[at] ^= 1 << chance.randrange(8)
        elif kind == "zero":
            content[at : at + 700] = bytes(len(content[at : at + 700]))
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = b"x" * chance.randint(1, 2000)
        else:
            content[at : at + 64] = chance.randbytes(len(content[at : at + 64]))
        changed = bytes(content) != path.read_bytes()
        path.write_bytes(content)
        assert bool(data.verify(folder)) == changed, (number, kind, path.name, at)
        problems: list[Problem] = []
        try:
            np.testing.assert_array_equal(read_all(folder)[0], whole[0])
        except UserError as error:
            problems = error.problems
        assert all(path.name.split(".")[0] in problem.where for problem in problems), problems
        shutil.rmtree(folder)


def test_json_of_the_manifest_has_no_room_for_unknown_keys(copy: Path):
    record = json.loads((copy / "manifest.json").read_text())
    record.pop("checksum")
    record["shards"][0]["extra"] = 1
    canonical = json.dumps(record, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    record["checksum"] = sha256(canonical.encode()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="extra"):
        Manifest.read(copy)
