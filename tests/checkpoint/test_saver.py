from __future__ import annotations

import threading

import pytest
import torch

from tozan.checkpoint import Saver, State, folders, load, save, saver
from tozan.errors import Problem, UserError


def steps(root):
    return [int(path.name.removeprefix("step-")) for path in sorted(root.iterdir())]


@pytest.mark.parametrize("background", [True, False])
def test_what_is_saved_is_the_state_at_the_call(tmp_path, background):
    weight, meta, files = torch.ones(1000), {"samples": [1]}, {"a.txt": b"1"}
    with Saver(tmp_path, background=background) as saver:
        for step in (1, 2):
            saver.save(State(step, {"model/w": weight}, meta, files))
            weight.add_(1)
            meta["samples"].append(2)
            files["a.txt"] = b"2"
    for step in (1, 2):
        state = load(tmp_path / f"step-{step:08d}")
        assert state.tensors["model/w"].eq(step).all()
        assert len(state.meta["samples"]) == step
        assert state.files["a.txt"] == b"%d" % step


def test_snapshot_buffers_are_used_again_and_follow_a_changed_shape(tmp_path):
    with Saver(tmp_path) as saver:
        saver.save(State(1, {"model/w": torch.ones(10), "model/v": torch.ones(1)}))
        first = saver._copies["model/w", 0].data_ptr()
        saver.save(State(2, {"model/w": torch.zeros(10)}))
        assert saver._copies.keys() == {("model/w", 0)}
        assert saver._copies["model/w", 0].data_ptr() == first
        saver.save(State(3, {"model/w": torch.zeros(10, dtype=torch.int64)}))
    assert load(tmp_path / "step-00000003").tensors["model/w"].dtype == torch.int64


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(1, 0, [12]), (2, 0, [11, 12]), (2, 5, [5, 10, 11, 12]), (1, 4, [4, 8, 12]), (99, 0, list(range(1, 13)))],
)
def test_retention(tmp_path, make_state, last, every, kept):
    with Saver(tmp_path, keep_last=last, keep_every=every) as saver:
        for step in range(1, 13):
            saver.save(make_state(step))
    assert steps(tmp_path) == kept


def test_retention_leaves_later_checkpoints_alone_and_keeps_the_one_just_written(tmp_path, make_state):
    for step in (10, 30, 40):
        save(tmp_path, make_state(step))
    with Saver(tmp_path, keep_last=1) as saver:
        saver.save(make_state(20))
    assert steps(tmp_path) == [20, 30, 40]


def test_at_most_one_write_is_in_flight(tmp_path, monkeypatch, make_state):
    real, running, most = saver.write, [], []

    def watched(*args):
        running.append(1)
        most.append(len(running))
        try:
            return real(*args)
        finally:
            running.pop()

    monkeypatch.setattr(saver, "write", watched)
    with Saver(tmp_path) as it:
        for step in range(1, 6):
            it.save(make_state(step))
    assert most == [1] * 5


def test_save_returns_before_the_write_is_done(tmp_path, monkeypatch, make_state):
    real, go = saver.write, threading.Event()

    def late(*args):
        go.wait(10)
        return real(*args)

    monkeypatch.setattr(saver, "write", late)
    with Saver(tmp_path) as it:
        it.save(make_state(1))
        assert it.last is None
        go.set()
        it.wait()
        assert it.last == tmp_path / "step-00000001"


def refuse(staged, *args):
    folders.delete(staged)
    raise UserError(Problem("there", "no"))


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_a_writer_s_error_comes_up_once_at_the_next_call(tmp_path, monkeypatch, make_state, call):
    it = Saver(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(saver, "write", refuse)
        it.save(make_state(1))
        with pytest.raises(UserError, match="there: no"):
            {"save": lambda: it.save(make_state(2)), "wait": it.wait, "close": it.close}[call]()
    it.wait()
    it.save(make_state(3))
    it.close()
    assert steps(tmp_path) == [3]


def test_leaving_the_block_raises_the_writer_s_error_but_never_hides_another(tmp_path, monkeypatch, make_state):
    monkeypatch.setattr(saver, "write", refuse)
    with pytest.raises(UserError, match="there: no"), Saver(tmp_path) as it:
        it.save(make_state(1))
    with pytest.raises(KeyError, match="first") as caught, Saver(tmp_path) as it:  # noqa: PT012
        it.save(make_state(1))
        raise KeyError("first")
    assert "there: no" in caught.value.__notes__[0]


def test_a_state_that_cannot_be_saved_is_refused_at_once(tmp_path):
    with Saver(tmp_path) as it, pytest.raises(ValueError, match="NaN"):
        it.save(State(1, {}, {"loss": float("inf")}))
