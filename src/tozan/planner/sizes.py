"""Which model a user means, and the batch that such a model is usually trained with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tozan.config import presets
from tozan.config.schema import Model
from tozan.errors import Problem, UserError
from tozan.models.arithmetic import Shape, parameters, resolve
from tozan.planner.published import shape_of


def find_shape(model: str) -> Shape:
    """The sizes of a preset, of a config's `[model]` table, or of a GPT of about a given size.

    Raises:
        UserError: none of these.
    """
    if model in presets.names():
        return resolve(Model(**presets.preset(model)), 50304)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)([MBT])", model, re.IGNORECASE)
    if size:
        billions = float(size[1]) * {"m": 1e-3, "b": 1.0, "t": 1e3}[size[2].lower()]
        return shape_of(billions, 2048, 51200)
    path = Path(model)
    if path.is_file():
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8")).get("model", {})
            keys = presets.preset(table["preset"]) if "preset" in table else {}
            return resolve(Model(**(keys | table)), 50304)
        except (ValueError, KeyError) as error:
            raise UserError(Problem(str(path), f"not a config with a [model] table: {error}")) from None
    fix = f"one of {', '.join(presets.names())}; a config's path; or a size such as 13B"
    raise UserError(Problem("MODEL", f"no preset and no file is called {model!r}", fix))


def default_batch(shape: Shape) -> int:
    """Samples of a step: 0.5, 1 or 4 Mi tokens by size, after GPT-3's table 2.1 (arXiv 2005.14165)."""
    size = parameters(shape)
    tokens = 2**19 if size < 1e9 else 2**20 if size < 1e10 else 2**22
    return max(1, tokens // shape.sequence)
