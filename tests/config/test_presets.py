"""The shapes that tozan ships, held to the numbers their authors published."""

from __future__ import annotations

from pathlib import Path

import pytest

from tozan.config import load, presets
from tozan.config.schema import Model
from tozan.models.arithmetic import parameters, resolve

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def count(name: str, **changes: int) -> int:
    return parameters(resolve(Model.model_validate(presets.preset(name) | changes), 4096))


@pytest.mark.parametrize(
    ("name", "changes", "published"),
    [
        # The models' own vocabulary of 50,257, before padding: the sizes of the released GPT-2 weights.
        ("gpt2-124m", {"vocabulary": 50257}, 124_439_808),
        ("gpt2-350m", {"vocabulary": 50257}, 354_823_168),
        # The sizes of the released LLaMA weights.
        ("llama-7b", {}, 6_738_415_616),
        ("llama-13b", {}, 13_015_864_320),
        ("llama-70b", {}, 68_976_648_192),
        ("llama-160m", {}, 162_417_408),
    ],
)
def test_published_parameters(name: str, changes: dict[str, int], published: int) -> None:
    assert count(name, **changes) == published


@pytest.mark.parametrize(
    ("name", "billions"),
    [("gpt2-1.3b", 1.3), ("fugaku-13b", 13.2), ("fugaku-30b", 30.0), ("demo-10m", 0.0088)],
)
def test_name_says_size(name: str, billions: float) -> None:
    assert count(name) == pytest.approx(billions * 1e9, rel=0.02)


@pytest.mark.parametrize("name", presets.names())
def test_preset_is_a_valid_model_table(name: str) -> None:
    table = presets.preset(name)
    Model.model_validate(table)
    assert {"family", "layers", "width", "heads", "sequence"} <= set(table)
    assert table.get("vocabulary", 64) % 64 == 0
    assert presets.text(name).startswith("# ")
    loaded = load(None, {"model.preset": name, "data.path": "data/x", "train.steps": 10})
    assert all(loaded.origin[f"model.{key}"] == f"preset {name}" for key in table)


def test_unknown_preset_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        presets.preset("gpt5")


def test_every_published_preset_has_a_config() -> None:
    assert {path.stem for path in CONFIGS} == set(presets.names())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_loads(path: Path) -> None:
    assert path.read_text().startswith("#:schema ./schema.json\n")
    loaded = load(path)
    assert loaded.config.model.preset == path.stem
    assert loaded.config.run.folder == f"runs/{path.stem}"
