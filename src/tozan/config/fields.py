"""Every field of a config as plain facts (type, bounds, default, meaning), and the JSON Schema; from `schema.py`."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from tozan.config import presets
from tozan.config.schema import Config

ALSO_CALLED = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "minimum_lr": "optim.min_lr",
    "min_learning_rate": "optim.min_lr",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "lr_decay_style": "optim.schedule",
    "warmup_steps": "optim.warmup",
    "warmup_iters": "optim.warmup",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_eps": "optim.eps",
    "wd": "optim.weight_decay",
    "clip_grad": "optim.clip",
    "grad_clip": "optim.clip",
    "max_grad_norm": "optim.clip",
    "batch_size": "train.global_batch",
    "global_batch_size": "train.global_batch",
    "micro_batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulate",
    "grad_accum": "train.accumulate",
    "max_steps": "train.steps",
    "max_iters": "train.steps",
    "train_iters": "train.steps",
    "dtype": "train.precision",
    "num_threads": "train.threads",
    "n_layer": "model.layers",
    "num_layers": "model.layers",
    "num_hidden_layers": "model.layers",
    "n_embd": "model.width",
    "d_model": "model.width",
    "hidden_size": "model.width",
    "n_head": "model.heads",
    "num_attention_heads": "model.heads",
    "num_key_value_heads": "model.kv_heads",
    "num_query_groups": "model.kv_heads",
    "ffn_hidden_size": "model.mlp_width",
    "intermediate_size": "model.mlp_width",
    "vocab_size": "model.vocabulary",
    "block_size": "model.sequence",
    "seq_length": "model.sequence",
    "max_position_embeddings": "model.sequence",
    "tie_word_embeddings": "model.tied",
    "rope_theta": "model.rope_base",
    "rms_norm_eps": "model.norm_eps",
    "save_interval": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "eval_interval": "eval.every",
    "eval_iters": "eval.samples",
    "log_interval": "metrics.every",
    "output_dir": "run.folder",
    "out_dir": "run.folder",
    "data_parallel": "layout.data",
}
"""What other trainers call our fields: a person coming from one of them is answered with our name."""


@dataclass(frozen=True)
class Field:
    """One config key.

    Attributes:
        key: `table.name`, or `version`.
        kind: `integer`, `number`, `boolean`, `string` or `array`.
        choices: the only values allowed, or empty.
        low: lower bound, or None. high: upper bound, or None.
        low_open: the lower bound itself is not allowed. high_open: nor the upper.
        default: value when left out; None where it is worked out from other values.
        required: it has no default.
        example: a value that may be written.
        text: what it means.
    """

    key: str
    kind: str
    choices: tuple[Any, ...]
    low: float | None
    high: float | None
    low_open: bool
    high_open: bool
    default: Any
    required: bool
    example: Any
    text: str

    @property
    def table(self) -> str:
        """The table it is in; empty for `version`."""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        """Its name inside the table."""
        return self.key.rpartition(".")[2]

    def allowed(self) -> str:
        """Which values may be written, in words and numbers: `a whole number from 1 to 10,000`."""
        if self.choices:
            return " or ".join(show(choice) for choice in self.choices)
        if self.kind == "string":
            return "text in quotes, on one line, not empty"
        if self.kind == "array":
            return "a list in brackets, or []"
        if self.kind == "boolean":
            return "true or false"
        noun = "a whole number" if self.kind == "integer" else "a number"
        if self.low_open or self.high_open:
            low = f"above {number(self.low)}" if self.low_open else f"from {number(self.low)}"
            return f"{noun} {low} and {'below' if self.high_open else 'at most'} {number(self.high)}"
        return f"{noun} from {number(self.low)} to {number(self.high)}"


def number(value: float | None) -> str:
    """A bound for reading: thousands with commas, no needless decimals."""
    if value is None:
        return "any"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,}" if isinstance(value, int) else repr(value)


def show(value: object, limit: int = 60) -> str:
    """A value as TOML writes it, cut to `limit` characters."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        text = f"[{', '.join(show(item) for item in value[:8])}{', …' if len(value) > 8 else ''}]"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        text = toml_string(value)
    elif isinstance(value, int) and abs(value) >= 10**40:
        text = f"a number of more than {40} digits"
    else:
        text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def toml_string(text: str) -> str:
    """A TOML basic string. JSON's escapes are TOML's too, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


@cache
def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 7) of a config file, for editors.

    Tables are written out where they are used, since draft 7 ignores what stands beside a `$ref`; `null` is left out,
    since TOML has none.
    """
    schema = Config.model_json_schema()
    tables = schema.pop("$defs")
    properties: dict[str, Any] = {}
    for name, entry in schema["properties"].items():
        table = tables.get(entry.get("$ref", "").rpartition("/")[2])
        properties[name] = _plain(entry) if table is None else _table(table)
    properties["model"]["properties"]["preset"]["enum"] = presets.names()
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "tozan config, version 1",
        "description": "A run: `tozan train` executes it.",
        "type": "object",
        "additionalProperties": False,
        "required": schema["required"],
        "properties": properties,
    }


def _table(table: dict[str, Any]) -> dict[str, Any]:
    plain = {name: _plain(entry) for name, entry in table["properties"].items()}
    required = {"required": table["required"]} if "required" in table else {}
    head = {"type": "object", "description": table["description"], "additionalProperties": False}
    return head | required | {"properties": plain}


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """Without titles, and with `X or null` as X."""
    some: dict[str, Any] = next((option for option in entry.get("anyOf", []) if option["type"] != "null"), {})
    kept = {key: value for key, value in entry.items() if key not in ("anyOf", "title")}
    if kept.get("default", 0) is None:
        del kept["default"]
    return {**some, **kept}


@cache
def fields() -> dict[str, Field]:
    """All keys a config may have, by `table.name`, in the order of the schema."""
    found: dict[str, Field] = {}
    for name, entry in json_schema()["properties"].items():
        if "properties" not in entry:
            found[name] = _field(name, entry, required=True)
            continue
        for inner, spec in entry["properties"].items():
            found[f"{name}.{inner}"] = _field(f"{name}.{inner}", spec, inner in entry.get("required", []))
    return found


def _field(key: str, spec: dict[str, Any], required: bool) -> Field:
    low = spec.get("minimum", spec.get("exclusiveMinimum"))
    high = spec.get("maximum", spec.get("exclusiveMaximum"))
    default = spec.get("default")
    return Field(
        key=key,
        kind=spec["type"],
        choices=tuple(spec["enum"]) if "enum" in spec else (spec["const"],) if "const" in spec else (),
        low=low,
        high=high,
        low_open="exclusiveMinimum" in spec,
        high_open="exclusiveMaximum" in spec,
        default=default,
        required=required,
        example=spec.get("examples", [default])[0],
        text=spec.get("description", ""),
    )


@cache
def tables() -> dict[str, str]:
    """The tables of a config and what each is about."""
    entries = json_schema()["properties"].items()
    return {name: entry["description"] for name, entry in entries if "properties" in entry}


def nearest_key(key: str) -> str | None:
    """The key most likely meant by an unknown `key`, or None if nothing is near.

    Looked for in this order: another trainer's name for it, the same name in another table, a similar name in the
    same table, a similar name anywhere.
    """
    known = fields()
    table, _, name = key.rpartition(".")
    name = name.lower().replace("-", "_")
    if name in ALSO_CALLED:
        return ALSO_CALLED[name]
    same_table = difflib.get_close_matches(name, [f.name for f in known.values() if f.table == table], 1, 0.75)
    if same_table:
        return f"{table}.{same_table[0]}" if table else same_table[0]
    same_name = [k for k, f in known.items() if f.name == name]
    if same_name:
        return difflib.get_close_matches(key, same_name, 1, 0.0)[0]
    near = difflib.get_close_matches(name, [f.name for f in known.values() if f.table == table], 1, 0.5)
    if near:
        return f"{table}.{near[0]}" if table else near[0]
    anywhere = difflib.get_close_matches(name, sorted({f.name for f in known.values()}), 1, 0.7)
    return next((k for k, f in known.items() if anywhere and f.name == anywhere[0]), None)


def nearest_table(name: str) -> str | None:
    """The table most likely meant by an unknown `name`, or None."""
    return next(iter(difflib.get_close_matches(name.lower(), list(tables()), 1, 0.5)), None)
