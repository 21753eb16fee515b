"""Several ranks save one checkpoint: each its boxes, together all or nothing."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest
import torch
from ranks import RankError, spawn

from tozan import checkpoint
from tozan.checkpoint import Box, Pieces, Saver, State, fingerprint, state_hash
from tozan.comm import Mesh
from tozan.comm.collectives import CommunicationError
from tozan.errors import UserError
from tozan.layout import Layout, rectangles, share, slabs
from tozan.train.crew import Crew

ROWS, COLUMNS = 37, 50


def matrix(step: int) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def part_of(whole: torch.Tensor, rank: int, size: int) -> Pieces:
    """A stretch of the flattened tensor, which is no rectangle."""
    start, stop = (whole.numel() * number // size for number in (rank, rank + 1))
    boxes = [
        Box(offset, whole[tuple(slice(at, at + n) for at, n in zip(offset, length, strict=True))])
        for offset, length in rectangles(whole.shape, start, stop)
    ]
    return Pieces(tuple(whole.shape), whole.dtype, tuple(boxes))


def state_at(step: int, rank: int, size: int) -> State:
    tensors = {"rng/cpu": torch.arange(9)} if rank == 0 else {}
    pieces = {"model/w": part_of(matrix(step), rank, size), "model/column": part_of(matrix(step)[:, :1], rank, size)}
    return State(step, tensors, {"samples": step}, {"a.txt": b"1"}, pieces)


def crew_of(size: int) -> Crew:
    return Crew.of(Mesh.create(Layout(dp=size), timeout_s=60))


def save_steps(root: Path, size: int, steps: int, background: bool) -> list[str]:
    crew = crew_of(size)
    with Saver(root, keep_last=2, background=background, crew=crew) as saver:
        for step in range(1, steps + 1):
            saver.save(state_at(step, crew.rank, size))
    return [path.name for path in sorted(root.iterdir())]


@pytest.mark.parametrize("background", [True, False])
def test_every_rank_writes_its_boxes_and_all_make_one_checkpoint(tmp_path, background):
    root = tmp_path / "checkpoints"
    for names in spawn(3, save_steps, root, 3, 3, background):
        assert names == ["step-00000002", "step-00000003"]
    folder = root / "step-00000003"
    assert checkpoint.verify(folder) == []
    files = [path.name for path in sorted(folder.glob("model-*"))]
    assert files == [f"model-rank00000{rank}-00001-of-00001.safetensors" for rank in range(3)]
    found = checkpoint.load(folder)
    assert torch.equal(found.tensors["model/w"], matrix(3))
    assert torch.equal(found.tensors["model/column"], matrix(3)[:, :1])
    assert found.files == {"a.txt": b"1"}
    table = json.loads((folder / "manifest.json").read_text())
    assert table["state"] == state_hash(found.tensors)
    written = [part["shape"] for part in table["tensors"]["model/w"]["parts"]]
    assert sum(rows * columns for rows, columns in written) == ROWS * COLUMNS
    assert len(written) > 3


def test_one_process_saves_the_same_state_hash_as_three_ranks(tmp_path):
    spawn(3, save_steps, tmp_path / "three", 3, 1, False)
    whole = State(1, {"model/w": matrix(1), "model/column": matrix(1)[:, :1], "rng/cpu": torch.arange(9)})
    one = checkpoint.save(tmp_path / "one", whole)
    tables = [json.loads((f / "manifest.json").read_text()) for f in (one, tmp_path / "three" / "step-00000001")]
    assert tables[0]["state"] == tables[1]["state"]


def test_boxes_are_filled_from_other_boxes_and_only_from_the_files_that_overlap(tmp_path):
    spawn(3, save_steps, tmp_path, 3, 1, False)
    folder = tmp_path / "step-00000001"
    (folder / "model-rank000002-00001-of-00001.safetensors").unlink()
    target = torch.zeros(20, 7, dtype=torch.float64)  # rows 2 to 22 of 37: in the first two ranks' stretches
    checkpoint.fill(folder, {"model/w": Pieces((ROWS, COLUMNS), torch.float64, (Box((2, 11), target),))})
    assert torch.equal(target, matrix(1)[2:22, 11:18])
    last = Pieces((ROWS, COLUMNS), torch.float64, (Box((36, 0), torch.zeros(1, 50, dtype=torch.float64)),))
    with pytest.raises(UserError, match="model-rank000002"):
        checkpoint.fill(folder, {"model/w": last})
    path = folder / "model-rank000000-00001-of-00001.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"model-rank000000.*does not match its checksum"):
        checkpoint.fill(folder, {"model/w": Pieces((ROWS, COLUMNS), torch.float64, (Box((2, 11), target),))})


def fail_once(root: Path, size: int, victim: int, number: int, background: bool) -> tuple[str, list[str], list[str]]:
    """Save, save again with a file system that refuses one rank's writes, and a third time with all well."""
    crew = crew_of(size)
    said, real = "", os.write
    with Saver(root, keep_last=9, background=background, crew=crew) as saver:
        saver.save(state_at(1, crew.rank, size))
        saver.wait()

        def refuse(descriptor, data):
            if "model-" in Path(f"/proc/self/fd/{descriptor}").readlink().name:
                raise OSError(number, os.strerror(number))
            return real(descriptor, data)

        if crew.rank == victim:
            os.write = refuse
        try:
            saver.save(state_at(2, crew.rank, size))
            saver.wait()
        except UserError as error:
            said = str(error)
        finally:
            os.write = real
        # Rank 0 may be at the next save already.
        after = sorted(path.name for path in root.iterdir() if not path.name.startswith(".saving-step-00000003"))
        saver.save(state_at(3, crew.rank, size))
    return said, after, sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize(("victim", "number"), [(0, errno.ENOSPC), (2, errno.ENOSPC), (1, errno.EIO)])
@pytest.mark.parametrize("background", [True, False])
def test_what_fails_on_one_rank_fails_the_save_on_all_with_one_error_and_leaves_the_old_one(
    tmp_path, victim, number, background
):
    outcomes = spawn(3, fail_once, tmp_path, 3, victim, number, background)
    messages = {said for said, _, _ in outcomes}
    assert len(messages) == 1, messages
    message = messages.pop()
    assert message.count("cannot write") == 1
    assert f"rank {victim}: " in message
    assert f"model-rank00000{victim}" in message
    assert errno.errorcode[number] in message
    for _, after, end in outcomes:
        assert after == ["step-00000001"]
        assert end == ["step-00000001", "step-00000003"]
    assert checkpoint.verify(tmp_path / "step-00000001") == checkpoint.verify(tmp_path / "step-00000003") == []


def find_newest(root: Path, size: int) -> tuple[str, list[str], list[str]]:
    """What this rank takes to be the newest good one, what it heard, and which files it read through."""
    heard, read, real = [], [], os.open

    def watch(path, *flags, **options):
        read.append(Path(path).name)
        return real(path, *flags, **options)

    os.open = watch
    try:
        found = checkpoint.newest(root, lambda problem: heard.append(str(problem)), crew=crew_of(size))
    finally:
        os.open = real
    return str(found), heard, [name for name in read if name.endswith(".safetensors")]


def test_ranks_share_the_reading_of_the_newest_and_pass_over_a_damaged_one_together(tmp_path):
    spawn(3, save_steps, tmp_path, 3, 2, False)
    path = tmp_path / "step-00000002" / "model-rank000001-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    outcomes = spawn(3, find_newest, tmp_path, 3)
    assert {found for found, _, _ in outcomes} == {str(tmp_path / "step-00000001")}
    for _, heard, _ in outcomes:
        assert len(heard) == 1
        assert path.name in heard[0]
    files = sorted(each.name for each in tmp_path.glob("step-*/*.safetensors"))
    assert sorted(name for _, _, read in outcomes for name in read) == files
    assert all(read for _, _, read in outcomes)
    (tmp_path / "step-00000001" / "trainer.json").unlink()
    with pytest.raises(RankError) as caught:
        spawn(3, find_newest, tmp_path, 3)
    assert "all 2 checkpoints are damaged" in str(caught.value)


def one_never_writes(root: Path, size: int) -> float:
    """Rank 1 begins no write; rank 0, whose writer waits for it, leaves because a collective failed."""
    crew = crew_of(size)
    started = time.monotonic()
    with pytest.raises(CommunicationError) as caught, Saver(root, crew=crew) as saver:  # noqa: PT012
        if crew.rank == 1:
            crew.tell = lambda key, text: None
        saver.save(state_at(1, crew.rank, size))
        raise CommunicationError("a peer is gone")
    assert crew.rank or "a rank is gone" in caught.value.__notes__[0]
    return time.monotonic() - started


def test_a_rank_that_is_gone_is_not_waited_for(tmp_path):
    assert max(spawn(2, one_never_writes, tmp_path, 2)) < 10
    assert checkpoint.newest(tmp_path, pytest.fail) is None
    with Saver(tmp_path) as saver:
        assert [path.name[:21] for path in saver.swept] == [".saving-step-00000001"]


def no_folder(root: Path, size: int) -> str:
    crew = crew_of(size)
    try:
        Saver(root, crew=crew)
    except UserError as error:
        return str(error)
    return ""


def test_a_folder_that_cannot_be_made_is_told_to_all(tmp_path):
    (tmp_path / "file").write_text("")
    said = set(spawn(3, no_folder, tmp_path / "file" / "checkpoints", 3))
    assert len(said) == 1
    assert "cannot make: Not a directory" in said.pop()


def peaks(root: Path, size: int) -> tuple[int, int]:
    """Peak bytes of tensors that saving, and then loading, allocates on this rank beyond what lives already."""
    crew = crew_of(size)
    elements = 1 << 20
    mine = torch.zeros(elements // size, 16)
    held = Pieces((elements, 16), torch.float32, (Box((crew.rank * len(mine), 0), mine),))
    state = State(1, {}, {}, {}, {"model/w": held})
    columns = torch.zeros(elements, 16 // size)
    other = Pieces((elements, 16), torch.float32, (Box((0, crew.rank * columns.shape[1]), columns),))
    results = []

    def load() -> None:
        checkpoint.fill(root / "step-00000001", {"model/w": other})

    with Saver(root, crew=crew, background=False) as saver:
        for work in (lambda: saver.save(state), load):
            with torch.profiler.profile(profile_memory=True) as profile:
                work()
            now = most = 0
            for event in profile.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    now += event.nbytes()
                    most = max(most, now)
            results.append(most)
    return tuple(results)


def test_no_rank_allocates_more_than_its_part_while_saving_and_loading(tmp_path):
    """64 MiB of state, saved by 4 ranks in rows and loaded in columns: a few blocks of 1 MiB, not 16 or 64."""
    for saving, loading in spawn(4, peaks, tmp_path, 4):
        assert 0 < saving <= 4 << 20
        assert 0 < loading <= 4 << 20


def test_rectangles_slabs_and_shares_hold_each_element_once():
    chance = torch.Generator().manual_seed(1)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=chance))

    for _ in range(200):
        shape = [number(1, 7) for _ in range(number(0, 4))]
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
        start, stop = sorted(number(0, whole.numel() + 1) for _ in range(2))
        for cut, expected in (
            (list(rectangles(shape, start, stop)), list(range(start, stop))),
            (list(slabs(shape, number(1, 30))), list(range(whole.numel()))),
        ):
            found = [
                whole[tuple(slice(at, at + n) for at, n in zip(offset, size, strict=True))].reshape(-1).tolist()
                for offset, size in cut
            ]
            assert [each for box in found for each in box] == expected
        assert len(list(rectangles(shape, start, stop))) <= max(1, 2 * len(shape) - 1)
        count, replicas = number(1, 5000), number(1, 9)
        rows = number(1, 80)
        shares = [share(count, rows, index, replicas, 100) for index in range(replicas)]
        assert [each for first, end in shares for each in range(first, end)] == list(range(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.complex64])
def test_a_fingerprint_is_the_sum_over_any_boxes_and_that_of_its_formula(dtype):
    whole = torch.randint(0, 256, (5, 3, 9 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    total = fingerprint.of(whole, (0, 0, 0))
    parts = fingerprint.zero()
    for box in part_of(whole, 0, 3).boxes + part_of(whole, 1, 3).boxes + part_of(whole, 2, 3).boxes:
        parts += fingerprint.of(box.tensor.contiguous(), box.offset)
    assert (parts == total).all()
    word = min(4, dtype.itemsize)
    words = [int.from_bytes(raw, "little") for raw in whole.contiguous().view(torch.uint8).numpy().reshape(-1, word)]
    columns = len(words) // 15
    keys = [fingerprint._keys(dim, 0, size) for dim, size in enumerate((5, 3, columns))]
    for lane in range(fingerprint.LANES):
        value = 0
        for at, x in enumerate(words):
            i, j, k = at // (3 * columns), at // columns % 3, at % columns
            value += x * int(keys[0][lane, i]) * int(keys[1][lane, j]) * int(keys[2][lane, k])
        assert value % 2**64 == int(total[lane])


def test_a_fingerprint_sees_swapped_rows_signs_and_neighbours():
    whole = torch.randn(6, 8)
    swapped, negative, turned = whole[[1, 0, 2, 3, 4, 5]], -whole, whole.T.contiguous().reshape(6, 8)
    signs = whole.clone()
    signs[0, 0] *= -1
    signs[3, 5] *= -1
    sums = {fingerprint.text(fingerprint.of(each, (0, 0))) for each in (whole, swapped, negative, turned, signs)}
    assert len(sums) == 5
    assert fingerprint.text(fingerprint.of(whole, (1, 0))) not in sums
    assert fingerprint.text(fingerprint.of(whole[:, :4], (0, 4096))) != fingerprint.text(
        fingerprint.of(whole[:, :4].contiguous(), (0, 0))
    )
