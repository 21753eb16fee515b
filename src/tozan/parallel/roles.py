"""The roles table: which layer of a model is what to a tensor-parallel scheme.

A table maps patterns of module names to roles; `*` stands for one component of a dotted name:

    {"embed": "vocab", "blocks.*.attn.qkv": "qkv", "blocks.*.mlp.fc": "col", "blocks.*.mlp.proj": "row", ...}

A role may state units that must not be cut: `col:12` is a product whose outputs are 12 heads, `qkv:32/8` a fused
[q; k; v] of 32 query and 8 key/value heads. Models with a `shape` (tozan's own) need not state their heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from torch import nn

from tozan.errors import Problem
from tozan.layout import Layout, Role
from tozan.models.arithmetic import Shape

ROLES: tuple[Role, ...] = get_args(Role)

_ROLE = re.compile(r"(?P<role>[a-z]+)(:(?P<units>[1-9][0-9]*)(/(?P<kv>[1-9][0-9]*))?)?")


@dataclass(frozen=True)
class Assigned:
    """A layer and its role.

    Attributes:
        name: dotted name of the module.
        module: the layer.
        role: what it is to a scheme.
        units: units of the outputs that must not be cut (`col`), or query and key/value heads (`qkv`).
    """

    name: str
    module: nn.Module
    role: Role
    units: tuple[int, ...] = ()


def assign(model: nn.Module, roles: Mapping[str, str]) -> tuple[list[Assigned], list[Problem]]:
    """Every layer that the table names, in the order of the model, and everything wrong with the table."""
    found: dict[str, Assigned] = {}
    problems: list[Problem] = []
    modules = dict(model.named_modules())
    empty = {
        f"{name}.{child}".lstrip(".")
        for name, module in modules.items()
        for child, value in (vars(module) | module._modules).items()
        if value is None
    }
    for pattern, text in roles.items():
        role, units, problem = _parse(pattern, text, model)
        if problem is not None:
            problems.append(problem)
            continue
        matches = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        names = [name for name in modules if matches.fullmatch(name)]
        if not names and not any(map(matches.fullmatch, empty)):
            problems.append(Problem(f"roles[{pattern!r}]", "no module has such a name", _near(pattern, modules)))
        for name in names:
            if name in found and found[name].role != role:
                what = f"{name} is {found[name].role!r} by another pattern and {role!r} by this one"
                problems.append(Problem(f"roles[{pattern!r}]", what, "give each module one role"))
            found[name] = Assigned(name, modules[name], role, units)
    problems += _without_role(modules, found)
    return [found[name] for name in modules if name in found], problems


def _parse(pattern: str, text: str, model: nn.Module) -> tuple[Role, tuple[int, ...], Problem | None]:
    """Role and units of an entry, or what is wrong with it."""
    where = f"roles[{pattern!r}]"
    match = _ROLE.fullmatch(text)
    role = next((role for role in ROLES if match and role == match["role"]), None)
    if match is None or role is None:
        return "norm", (), Problem(where, f"{text!r} is no role", f"use one of {', '.join(ROLES)}")
    units = tuple(int(match[group]) for group in ("units", "kv") if match[group])
    if role == "qkv":
        shape = getattr(model, "shape", None)
        if not units and isinstance(shape, Shape):
            return role, (shape.heads, shape.kv_heads), None
        if not units:
            return role, (), Problem(where, "the numbers of heads are not known", "write them: qkv:32/8")
        return role, (units[0], units[-1]), None
    if len(units) == 2 or (units and role != "col"):
        return role, (), Problem(where, f"{text!r} states units that role {role} has not", f"write {role!r}")
    return role, units, None


def _near(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    """Names that the writer of a pattern may have meant: those with its last component."""
    last = pattern.rpartition(".")[2]
    close = [name for name in modules if name.rpartition(".")[2] == last]
    return f"did you mean {close[0]}?" if close else "the names are those of model.named_modules()"


def _without_role(modules: Mapping[str, nn.Module], found: Mapping[str, Assigned]) -> Iterator[Problem]:
    """One problem for each module that has parameters of its own but no role."""
    for name, module in modules.items():
        own = [leaf for leaf, _ in module.named_parameters(recurse=False)]
        if own and name not in found:
            what = f"has parameters ({', '.join(own)}) but no role"
            yield Problem(name or "the model itself", what, f"give it one of {', '.join(ROLES)}")


def indivisible(layer: Assigned, layout: Layout) -> Iterator[Problem]:
    """What of a layer the scheme cannot cut into equal parts, each with the arithmetic."""
    for what, count, parts in _cuts(layer, layout):
        if parts > 1 and count % parts:
            where, left = f"{layer.name} (role {layer.role})", count % parts
            across = f"tp = {layout.tp}" if layout.scheme == "1d" else f"a side of q = {parts} (tp = {layout.tp})"
            fits = ", ".join(str(n) for n in range(1, min(count, 64) + 1) if count % n == 0)
            yield Problem(where, f"{what} {count} over {across}: {left} left over", f"{count} splits by {fits}")


def _cuts(layer: Assigned, layout: Layout) -> list[tuple[str, int, int]]:
    """(what, how many, in how many parts) for every cut that a scheme makes."""
    weight = getattr(layer.module, "weight", None)
    if weight is None:
        return []
    shape, n = tuple(weight.shape), layout.sizes["tp_col"]
    outputs = {
        "qkv": [("query heads", unit, n) for unit in layer.units[:1]]
        + [("key/value heads", unit, n) for unit in layer.units[1:]],
        "col": [("units of outputs", unit, n) for unit in layer.units] or [("outputs", shape[0], n)],
        "vocab": [("vocabulary", shape[0], n)],
    }
    if layout.scheme == "1d":
        return outputs.get(layer.role, [("inputs", shape[1], n)] if layer.role == "row" else [])
    if layer.role in ("norm", "position"):
        return [("width", shape[-1], n)]
    return [*outputs.get(layer.role, [("outputs", shape[0], n)]), ("inputs", shape[1], n)]
