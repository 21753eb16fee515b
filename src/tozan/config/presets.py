"""Shapes that tozan ships: one TOML file each, holding keys of the `[model]` table and where they come from."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

_FOLDER = files("tozan.config") / "presets"


@cache
def names() -> list[str]:
    """All preset names, sorted by family and then by size as written in the names."""
    return sorted(file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if file.name.endswith(".toml"))


def preset(name: str) -> dict[str, Any]:
    """The keys of the `[model]` table that a preset gives.

    Raises:
        KeyError: no such preset; `names()` lists them.
    """
    if name not in names():
        raise KeyError(name)
    return tomllib.loads(text(name))


def text(name: str) -> str:
    """A preset's file as it is written, with its comments."""
    return (_FOLDER / f"{name}.toml").read_text(encoding="utf-8")
