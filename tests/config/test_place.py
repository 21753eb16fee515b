"""What a run needs where it starts: processes, data, a run folder of its own, packages."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tozan.config import Config, Loaded, check, load, place
from tozan.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished data set, in one process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    write_manifest(tmp_path / "data")
    return tmp_path


def write_manifest(folder: Path, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    manifest = {"format": "tozan-data", "vocabulary": 300, "splits": {"train": {"tokens": 10_000}}}
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def loaded(**changes: Any) -> Loaded:
    values = {"model.preset": "gpt2-tiny", "data.path": "data", "train.steps": 10, "run.folder": "run"}
    return load(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def begun_with(config: Loaded, folder: Path = Path("run")) -> None:
    """A run folder as the trainer leaves it after its first checkpoint."""
    (folder / "checkpoints" / "step-00000005").mkdir(parents=True)
    (folder / "config.toml").write_text(config.toml(), encoding="utf-8")


def refused(config: Loaded) -> str:
    with pytest.raises(UserError) as caught:
        config.require_ready()
    return str(caught.value)


def test_ready() -> None:
    loaded().require_ready()
    assert not Path("run").exists()


def test_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "layout.data 4 needs 4 processes, this run has 1" in refused(loaded(layout__data=4))
    loaded(layout__data=4).require_ready(world_size=4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    loaded(layout__data=4).require_ready()
    assert "layout.data 1 needs 1 process, this run has 4" in refused(loaded())
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert "environment WORLD_SIZE" in refused(loaded())


def test_world_size_in_check() -> None:
    config = loaded(layout__data=2).config
    assert not check(config)
    assert not check(config, world_size=2)
    assert "layout.data 2 needs 2 processes, this run has 1" in str(check(config, world_size=1)[0])


def test_data(here: Path) -> None:
    assert "tozan data build SOURCES --out nowhere" in refused(loaded(data__path="nowhere"))
    (here / "file").touch()
    assert "is a file" in refused(loaded(data__path="file"))
    (here / "unfinished").mkdir()
    assert "holds no manifest.json" in refused(loaded(data__path="unfinished"))
    (here / "unfinished" / "manifest.json").write_text("{")
    assert "not the manifest" in refused(loaded(data__path="unfinished"))
    (here / "unfinished" / "manifest.json").write_text("[]")
    assert "not the manifest" in refused(loaded(data__path="unfinished"))


def test_data_fits_the_model(here: Path) -> None:
    text = refused(loaded(model__vocabulary=256))
    assert "model.vocabulary 256 is less than the 300 tokens" in text
    assert "vocabulary = 320" in text
    write_manifest(here / "data", splits={"train": {"tokens": 64}})
    assert "model.sequence 64 needs 65 tokens" in refused(loaded())


def test_folder_without_permission(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "locked").mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write anywhere, so the kernel's answer is replaced
        monkeypatch.setattr(place.os, "access", lambda path, mode: Path(path).name != "locked")
    assert f"no permission to write in {here / 'locked'}" in refused(loaded(run__folder="locked/run"))


def test_run_folder_is_a_file(here: Path) -> None:
    (here / "file").touch()
    assert "is a file" in refused(loaded(run__folder="file"))
    assert "is a file" in refused(loaded(run__folder="file/run"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model__layers": 3}, "model.layers 2, here 3"),
        ({"model__preset": "llama-tiny"}, "model.family gpt2, here llama"),
        ({"model__kv_heads": 2}, "model.kv_heads 4, here 2"),
        ({"model__dropout": 0.1}, "model.dropout 0.0, here 0.1"),
        ({"train__seed": 1}, "train.seed 0, here 1"),
        ({"data__seed": 1}, "data.seed 0, here 1"),
    ],
)
def test_other_runs_are_not_continued(change: dict[str, Any], said: str) -> None:
    begun_with(loaded())
    text = refused(loaded(**change))
    assert said in text
    assert "new run.folder" in text


@pytest.mark.parametrize(
    "change",
    [
        {"train__steps": 20},
        {"optim__lr": 1e-4},
        {"train__global_batch": 8},
        {"train__precision": "fp32"},
        {"model__vocabulary": 320},
        {"model__kv_heads": 4},
        {"model__mlp_width": 256},
    ],
)
def test_the_same_run_is_continued(change: dict[str, Any]) -> None:
    begun_with(loaded())
    loaded(**change).require_ready()


def test_folder_without_a_checkpoint_is_free() -> None:
    begun_with(loaded())
    (Path("run") / "checkpoints" / "step-00000005").rmdir()
    loaded(model__layers=3).require_ready()


def test_damaged_config_of_the_run() -> None:
    begun_with(loaded())
    Path("run/config.toml").write_text("= nonsense")
    assert "config.toml cannot be read" in refused(loaded())


def test_what_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(place.shutil, "which", lambda _: None)
    monkeypatch.setattr(place, "has_gpu", lambda: False)
    text = refused(loaded(metrics__tensorboard=True, metrics__wandb="mine", train__compile=True, train__device="cuda"))
    for part in ("tozan[tensorboard]", "tozan[wandb]", "C++ compiler", "needs a GPU"):
        assert part in text


def test_mistakes_in_the_file_and_here_are_said_at_once(here: Path) -> None:
    (here / "run.toml").write_text('version = 1\n[data]\npath = "nowhere"\n[train]\nsteps = "x"\n')
    with pytest.raises(UserError) as caught:
        load(Path("run.toml"), ["--layout.data", "2"], to_run=True)
    assert [problem.where for problem in caught.value.problems] == ["run.toml:3", "run.toml:5", "--layout.data"]


def test_config_is_frozen() -> None:
    config: Config = loaded().config
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 5  # type: ignore[misc]
