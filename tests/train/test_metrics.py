import json
import math
import time

import pytest

from tozan.config.schema import Config
from tozan.errors import UserError
from tozan.train.metrics import Jsonl, Metrics, Wandb, scalars

CONFIG = {"version": 1, "data": {"path": "x"}, "train": {"steps": 1}}


def test_jsonl_is_always_valid_json_even_after_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "st')
    sink = Jsonl(path)
    sink.write({"kind": "step", "step": 1, "loss": math.nan, "phases": {"data": math.inf}})
    sink.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1]) == {"kind": "step", "step": 1, "loss": None, "phases": {"data": None}}


def test_scalars_flatten_phases_and_leave_words_out():
    record = {"kind": "step", "step": 3, "loss": 2.5, "phases": {"data": 0.5}, "skipped": None, "lr": math.nan}
    assert scalars(record) == {"step/loss": 2.5, "step/phases/data": 0.5}


def test_tensorboard_files_hold_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Config.model_validate({**CONFIG, "metrics": {"tensorboard": True}})
    metrics = Metrics.open(tmp_path, config, None)
    for step in (1, 2, 3):
        metrics.write("step", step, loss=10.0 / step, skipped=None)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(1, 10.0), (2, 5.0), (3, pytest.approx(10 / 3))]


def test_wandb_runs_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = Wandb(tmp_path, "tozan-test", {"a": 1})
    sink.write({"kind": "step", "step": 1, "loss": 2.0})
    sink.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    # A process of W&B's own writes the file, and may still do so when `finish` has returned.
    late = time.monotonic() + 100
    while b"step/loss" not in file.read_bytes():
        assert time.monotonic() < late
        time.sleep(0.02)


def test_a_missing_library_is_the_users_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'tozan\[wandb\]'"):
        Wandb(tmp_path, "x", {})
