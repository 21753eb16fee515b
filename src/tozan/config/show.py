"""What `tozan config show` prints: every value with its origin, as a table on a screen and as plain text elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from tozan.config import presets
from tozan.config.fields import fields, show
from tozan.config.loader import Loaded
from tozan.config.schema import Config, Model
from tozan.models import arithmetic

Rows = list[tuple[str, ...]]


def value_rows(loaded: Loaded) -> Rows:
    """(key, value, origin) of every field, in the order of the schema."""
    rows: Rows = []
    later = _worked_out_later(loaded.config)
    for spec in fields().values():
        owner = getattr(loaded.config, spec.table) if spec.table else loaded.config
        value = getattr(owner, spec.name)
        shown = show(value) if value is not None else later.get(spec.key, "none")
        rows.append((spec.key, shown, loaded.origin[spec.key]))
    return rows


def _worked_out_later(config: Config) -> dict[str, str]:
    """What fields that are None come to when the run starts."""
    shape = arithmetic.resolve(config.model, tokenizer_size=64)
    return {
        "model.kv_heads": str(shape.kv_heads),
        "model.mlp_width": str(shape.mlp_width),
        "model.vocabulary": "tokenizer's",
        "optim.decay": str(max(1, config.train.steps // 5)) if config.optim.schedule == "wsd" else "unused",
    }


def preset_rows() -> Rows:
    """Rows under `PRESET_HEADINGS`, smallest first; where the tokenizer sets the vocabulary, `+` an embedding."""
    found = []
    for name in presets.names():
        model = Model.model_validate(presets.preset(name))
        shape = arithmetic.resolve(model, tokenizer_size=64)
        count = arithmetic.parameters(shape)
        if model.vocabulary is None:
            count -= shape.vocabulary * shape.width * (1 if shape.tied else 2)
        words = f"{count:,}" + (" +" if model.vocabulary is None else "")
        heads = str(shape.heads) if shape.kv_heads == shape.heads else f"{shape.heads}/{shape.kv_heads} kv"
        sizes = (str(shape.layers), f"{shape.width:,}", heads, f"{shape.sequence:,}")
        vocabulary = f"{model.vocabulary:,}" if model.vocabulary else "tokenizer's"
        found.append((count, (name, words, shape.family, *sizes, vocabulary)))
    return [row for _, row in sorted(found)]


PRESET_HEADINGS = ("preset", "parameters", "family", "layers", "width", "heads", "sequence", "vocabulary")
VALUE_HEADINGS = ("key", "value", "from")


def summary(config: Config) -> str:
    """One line about a run: model, parameters, tokens."""
    model, train = config.model, config.train
    shape = arithmetic.resolve(model, tokenizer_size=64)
    name = model.preset or f"{model.family}, {model.layers} layers × {model.width}"
    size = f"{arithmetic.parameters(shape):,} parameters"
    if model.vocabulary is None:
        without = arithmetic.parameters(shape) - shape.vocabulary * shape.width * (1 if shape.tied else 2)
        size = f"{without:,} parameters beside the embedding"
    batch = train.global_batch or 1
    tokens = train.steps * batch * model.sequence
    return f"{name}, {size}; {train.steps:,} steps × {batch:,} samples × {model.sequence:,} tokens = {tokens:,} tokens"


def print_table(headings: Sequence[str], rows: Rows, *, screen: bool) -> None:
    """Print rows: with rich on a screen, else in aligned columns that `grep` and `awk` can read."""
    if not screen:
        print(plain(rows), end="")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*headings, box=None, header_style="bold", pad_edge=False)
    last_group = ""
    for row in rows:
        group = row[0].partition(".")[0] if headings == VALUE_HEADINGS else ""
        if group != last_group and table.row_count:
            table.add_section()
        last_group = group
        style = "dim" if row[-1].startswith("default") else ""
        table.add_row(*(Text(cell, style=style, overflow="fold") for cell in row))
    Console(width=max(84, shutil.get_terminal_size().columns)).print(table)


def plain(rows: Rows) -> str:
    """Aligned columns, two blanks between them."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )
