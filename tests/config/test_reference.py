"""The files made from the schema are current, and editors' validators agree with tozan."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest

from tozan.config import load, reference, show
from tozan.config.fields import ALSO_CALLED, fields, json_schema, tables
from tozan.errors import UserError

ROOT = Path(__file__).parents[2]


def test_reference_page_is_current() -> None:
    current = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert current == reference.page(), "run: tozan config schema --page > docs/config.md"


def test_schema_file_is_current() -> None:
    current = (ROOT / "configs" / "schema.json").read_text(encoding="utf-8")
    assert current == reference.schema_text(), "run: tozan config schema > configs/schema.json"


def test_schema_is_valid_json_schema() -> None:
    jsonschema.Draft7Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configs_match_the_schema(path: Path) -> None:
    jsonschema.validate(tomllib.loads(path.read_text()), json_schema(), jsonschema.Draft7Validator)


@pytest.mark.parametrize(
    "table",
    [
        {"train": {"steps": 0}},
        {"train": {"steps": 1, "stepz": 1}},
        {"train": {"steps": 1, "precision": "fp8"}},
        {"train": {"steps": 1}, "optim": {"lr": 0}},
        {"train": {"steps": 1}, "model": {"preset": "gpt9"}},
        {"train": {}},
    ],
)
def test_schema_refuses_what_tozan_refuses(table: dict[str, dict[str, object]], tmp_path: Path) -> None:
    tree = {"version": 1, "data": {"path": "x"}, **table}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, json_schema())
    flat = {f"{name}.{key}": value for name, keys in table.items() for key, value in keys.items()}
    with pytest.raises(UserError):
        load(None, {"data.path": "x", **flat})


def test_every_field_and_table_is_explained() -> None:
    assert all(spec.text.endswith((".", ")")) and len(spec.text) > 10 for spec in fields().values())
    assert all(text for text in tables().values())


def test_other_names_lead_to_fields() -> None:
    assert set(ALSO_CALLED.values()) <= set(fields())


def test_example_in_the_page_loads(tmp_path: Path) -> None:
    example = re.search(r"```toml\n(.*?)```", reference.page(), re.DOTALL)
    assert example
    (tmp_path / "run.toml").write_text(example[1])
    load(tmp_path / "run.toml")


def test_page_states_the_batch_rules_truly() -> None:
    for given, expected in [({}, (4, 1)), ({"train.micro_batch": 3}, (3, 1)), ({"train.accumulate": 3}, (4, 3))]:
        train = load(None, {"data.path": "x", "train.steps": 5, **given}).config.train
        assert (train.micro_batch, train.accumulate) == expected
    train = load(None, {"data.path": "x", "train.steps": 5, "train.global_batch": 18, "layout.data": 2}).config.train
    assert (train.micro_batch, train.accumulate) == (3, 3)


def test_rows_show_every_value() -> None:
    rows = show.value_rows(load(None, {"data.path": "x", "train.steps": 50, "optim.schedule": "wsd"}))
    assert [row[0] for row in rows] == list(fields())
    values = {key: (value, origin) for key, value, origin in rows}
    assert values["train.steps"] == ("50", "argument train.steps")
    assert values["model.mlp_width"][0] == "3072"
    assert values["optim.decay"][0] == "10"
    assert values["metrics.wandb"][0] == "none"


def test_plain_columns_line_up() -> None:
    assert show.plain([("a", "bb", "c"), ("aaa", "b", "")]) == "a    bb  c\naaa  b\n"


def test_summary_counts_tokens() -> None:
    config = load(None, {"data.path": "x", "train.steps": 10, "train.global_batch": 4}).config
    assert "10 steps × 4 samples × 1,024 tokens = 40,960 tokens" in show.summary(config)
    assert json.loads(reference.schema_text())["required"] == ["version", "data", "train"]
