"""Precedence, origins, and configs that load again to the same run."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tozan.config import load
from tozan.config.fields import Field, fields
from tozan.config.schema import Config
from tozan.config.sources import parse_value, read_flags
from tozan.errors import UserError

FILE = """\
version = 1
[model]
preset = "gpt2-tiny"
width = 128
[data]
path = "data/x"
[train]
steps = 100
global_batch = 48
[optim]
lr = 1e-3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    return path


def test_precedence_and_origins(file: Path) -> None:
    loaded = load(file, ["--optim.lr", "2e-3", "--optim.clip=0.5", "--optim.clip", "0.25", "--train.compile"])
    config, origin = loaded.config, loaded.origin
    assert (config.optim.beta1, origin["optim.beta1"]) == (0.9, "default")
    assert (config.model.layers, origin["model.layers"]) == (2, "preset gpt2-tiny")
    assert (config.model.width, origin["model.width"]) == (128, f"{file}:4")
    assert (config.optim.lr, origin["optim.lr"]) == (2e-3, "--optim.lr")
    assert (config.optim.clip, origin["optim.clip"]) == (0.25, "--optim.clip")
    assert (config.train.compile, origin["train.compile"]) == (True, "--train.compile")
    assert (config.train.micro_batch, config.train.accumulate) == (48, 1)
    assert origin["train.micro_batch"].startswith("solved: global_batch 48")
    assert set(origin) == set(fields())


def test_preset_from_a_flag_warns_of_sizes_that_stay(file: Path) -> None:
    loaded = load(file, ["--model.preset", "llama-tiny"])
    assert (loaded.config.model.family, loaded.config.model.width) == ("llama", 128)
    assert [warning.where for warning in loaded.warnings] == [f"{file}:4"]


def test_no_file_takes_flags_or_a_mapping() -> None:
    flags = load(None, ["--data.path", "x", "--train.steps", "5", "--metrics.profile", "[1, 2]"])
    mapping = load(None, {"data.path": "x", "train.steps": 5, "metrics.profile": [1, 2]})
    assert flags.config == mapping.config
    assert mapping.origin["train.steps"] == "argument train.steps"
    with pytest.raises(UserError, match=r"train\.steps is missing(.|\n)*--train\.steps 1000"):
        load(None, {"data.path": "x"})


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (["--train.precision", "fp16", "--train.device", "cpu"], "fp16"),
        (["--optim.decay", "5"], "no effect"),
        (["--layout.zero=2"], "no effect with 1 replica"),
        (["--optim.schedule", "constant", "--optim.min_lr", "1e-5"], "no effect"),
        (["--train.threads", "60000"], "cores"),
        (["--model.width", "65536", "--model.layers", "100"], "GiB"),
    ],
)
def test_warnings_do_not_stop(file: Path, flags: list[str], warned: str) -> None:
    assert any(warned in warning.what for warning in load(file, flags).warnings)


def test_hardware_threads_are_no_cores(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = importlib.import_module("tozan.config.check")  # the package's own `check` is a function
    monkeypatch.setattr(check, "cores", lambda: 4)
    monkeypatch.setattr(check, "hardware_threads", lambda: 8)
    [warning] = load(file, ["--train.threads=8"]).warnings
    assert "train.threads 8 is more than the 4 cores (8 hardware threads, which share" in warning.what
    assert "threads = 4" in warning.fix
    assert not load(file, ["--train.threads=4"]).warnings


def strategy(spec: Field) -> st.SearchStrategy[Any]:
    """Values that a field allows on its own."""
    if spec.key in ("version", "model.preset"):
        return st.just(1 if spec.key == "version" else "llama-tiny")
    if spec.choices:
        return st.sampled_from(spec.choices)
    if spec.kind == "boolean":
        return st.booleans()
    if spec.kind == "string":
        return st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
    if spec.kind == "integer":
        return st.integers(int(spec.low or 0), min(int(spec.high or 0), 4096))
    if spec.kind == "number":
        edges = {"exclude_min": spec.low_open, "exclude_max": spec.high_open}
        return st.floats(spec.low, spec.high, allow_nan=False, **edges)
    return st.just([1, 2])


some_values = st.fixed_dictionaries(
    {"data.path": strategy(fields()["data.path"]), "train.steps": st.integers(4097, 10**6)},
    optional={key: strategy(spec) for key, spec in fields().items() if key not in ("data.path", "train.steps")},
)


@given(values=some_values)
def test_complete_toml_loads_again(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        loaded = load(None, values)
    except UserError:
        return  # fields that are each fine but break a rule together
    text = loaded.toml()
    again = tmp_path_factory.getbasetemp() / "again.toml"
    again.write_text(text, encoding="utf-8")
    assert load(again).config == loaded.config
    assert Config.model_validate(tomllib.loads(text)) == loaded.config


@given(values=some_values)
def test_flags_say_what_a_mapping_says(values: dict[str, Any]) -> None:
    def written(key: str, value: Any) -> str:
        if isinstance(value, str):
            return value if value[0] not in "\"'" else f"'''{value}'''"
        return str(value).lower() if isinstance(value, bool) else repr(value)

    flags = [f"--{key}={written(key, value)}" for key, value in values.items() if "'''" not in str(value)]
    kept = {key: value for key, value in values.items() if "'''" not in str(value) and not str(value).endswith("'")}
    read = {key: entry.value for key, entry in read_flags(flags).values.items()}
    assert {key: read[key] for key in kept} == kept


@given(st.text(max_size=20))
def test_any_text_as_a_flag_value_is_taken_or_kept(text: str) -> None:
    """Whatever is typed, a flag's value is a TOML value or the text itself; nothing escapes into other keys."""
    for key in ("optim.lr", "train.steps", "train.compile", "metrics.profile", "data.path"):
        value = parse_value(fields()[key], text)
        if value != text:
            expected = tomllib.loads(f"value = {text}")["value"]
            assert value == expected or (value != value and expected != expected)


@given(content=st.text(max_size=200) | st.binary(max_size=200))
def test_any_file_is_a_user_error_at_worst(content: str | bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError):
        load(path)


def test_other_things_than_files(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(FILE)
    with pytest.raises(UserError, match=r"no such file(.|\n)*did you mean .*run\.toml"):
        load(tmp_path / "run.tml")
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "weights.toml").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="not UTF-8"):
        load(tmp_path / "weights.toml")
    with (tmp_path / "large.toml").open("wb") as large:
        large.truncate(2 << 20)
    with pytest.raises(UserError, match="2,097,152 bytes"):
        load(tmp_path / "large.toml")
