"""The two files made from the schema: the reference page `docs/config.md` and `configs/schema.json` for editors.

`tozan config schema --page` and `tozan config schema` print them; a test compares them with what is in the repository.
"""

from __future__ import annotations

import json

from tozan.config import show
from tozan.config.fields import Field, fields, json_schema, tables
from tozan.config.fields import show as shown

_HEAD = """\
# The config

<!-- Made from the schema by `tozan config schema --page > docs/config.md`; change the docstrings in
src/tozan/config/schema.py instead. -->

A run is one TOML file:

```toml
#:schema ./schema.json
version = 1

[model]
preset = "gpt2-124m"

[data]
path = "data/mine"

[train]
steps = 1000
global_batch = 32
```

`tozan train run.toml` executes it. `version`, `data.path` and `train.steps` are required; all else has a default.

- **Flags** change single values: `tozan train run.toml --optim.lr 1e-3 --train.steps=50`. Values are TOML values, but
  text needs no quotes; a switch may stand alone (`--train.compile`). Of a flag written twice, the later one counts.
- **Precedence**, from least to most: default, preset, file, flag. A size given beside a preset replaces the preset's,
  also when the preset is a flag and the size is in the file (you are warned then).
- **Nothing is guessed**: unknown tables and keys, wrong types and impossible numbers are refused, all at once, each
  with its file and line (or flag), the rule, and what to write instead. Whole numbers are written whole (`1000`, or
  `1_000`, not `1e3`).
- `tozan config show run.toml` prints every value and where it came from; with `--toml`, as a complete config.
- `tozan config check run.toml` checks it without training; with `--here`, also what the run needs on this machine.
- **Editors** that know TOML (taplo, Even Better TOML) complete and check configs whose first line names the schema:
  `#:schema ./schema.json`. `tozan config schema > schema.json` writes it.

## The batch

`global_batch = micro_batch × accumulate × layout.data`, in samples. Give any of the three, the rest is solved for:

| given | the rest |
|---|---|
| nothing | `micro_batch` holds 4,096 tokens (4 samples of 1,024; at least 1), `accumulate` is 1 |
| `micro_batch` or `accumulate` | the other takes that default, `global_batch` is the product |
| `global_batch` | `micro_batch` is the largest divisor of a process's share up to that default |
| two of them | the third, if it comes out whole |
| all three | they must agree: `global_batch 256 ≠ micro_batch 4 × accumulate 8 × data 1 = 32` is refused |

## Continuing a run

A `run.folder` that holds checkpoints is continued. What they depend on must not change: the sizes in `[model]`,
`data.seed` and `train.seed`; another value is refused, since it would be another run. All else may change (`steps`,
learning rate, batch, precision, where the data lies, ...), and the run goes on with the new values.
"""


def page() -> str:
    """The reference page, in Markdown."""
    parts = [
        _HEAD,
        "## Presets\n",
        "For `model.preset`, smallest first; `+` is the embedding of a vocabulary that the tokenizer sets.\n",
        _markdown_presets(),
    ]
    for table, text in tables().items():
        parts += [f"## [{table}]\n", f"{text}\n"]
        rows = [_row(spec) for spec in fields().values() if spec.table == table]
        parts.append("\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def schema_text() -> str:
    """The JSON Schema as a file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _markdown_presets() -> str:
    rows = [show.PRESET_HEADINGS, ("---",) * len(show.PRESET_HEADINGS), *show.preset_rows()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _row(spec: Field) -> str:
    allowed = "the name of a preset" if spec.key == "model.preset" else spec.allowed()
    if spec.choices and spec.key != "model.preset":
        allowed = " or ".join(f"`{shown(choice)}`" for choice in spec.choices)
    text, _, computed = " ".join(spec.text.split()).partition(" Default: ")
    if spec.required:
        default = "required"
    elif spec.default is not None:
        default = f"`{shown(spec.default)}`"
    else:
        default = computed.rstrip(".") or "none"
    return f"| `{spec.name}` | {allowed} | {default} | {text} |"
