"""The scanner finds every key that tomllib finds, on the line where it stands."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tozan.config.lines import key_lines


def paths(tree: Any, prefix: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """Every path in what tomllib made of a document."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = set()
    for name, value in items:
        found |= {(*prefix, name)} | paths(value, (*prefix, name))
    return found


# Keys and values together with how they may be written; every key of a document is made unique by its number.
bare = st.text("abcxyz019_-", min_size=1, max_size=6)
quoted = st.text("ab .=#[]'\"\\é\t{}", max_size=6)


def basic(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\t", "\\t")
    return f'"{escaped}"'


@st.composite
def keys(draw: st.DrawFn, number: int) -> str:
    """A key that no other key of the document repeats, in any of the three ways of writing."""
    way = draw(st.sampled_from(["bare", "basic", "literal"]))
    if way == "bare":
        return f"{draw(bare)}k{number}"
    text = f"{draw(quoted)}k{number}"
    return basic(text) if way == "basic" or "'" in text else f"'{text}'"


scalars = st.sampled_from(
    [
        "1",
        "-3.5e-7",
        "+1_000",
        "0xff",
        "inf",
        "nan",
        "true",
        "1979-05-27",
        "1979-05-27 07:32:00",
        "1979-05-27T07:32:00Z",
        "07:32:00",
        '""',
        '"a # [b] = {c}"',
        "'\\'",
        "''",
        '"\\"\\\\"',
        '"""\nx = 1\n[t]\n"quotes" \\\n  """',
        '"""ends in quotes"""""',
        "'''\n# 'no' comment\n'''",
        "'''a'''''",
    ]
)
gaps = st.sampled_from(["", " ", "\n", " # ]} comment\n\t", "\n\n"])


@st.composite
def values(draw: st.DrawFn, depth: int = 2) -> str:
    kind = draw(st.sampled_from(["scalar", "scalar", "array", "table"])) if depth else "scalar"
    if kind == "scalar":
        return draw(scalars)
    count = draw(st.integers(0, 3))
    if kind == "table":
        blank = draw(st.sampled_from(["", " "]))
        inner = [f"{draw(keys(i))}{blank}={blank}{draw(values(depth - 1))}" for i in range(count)]
        return f"{{{blank}{', '.join(inner)}{blank}}}"
    items = [f"{draw(gaps)}{draw(values(depth - 1))}{draw(gaps)}," for _ in range(count)]
    return f"[{''.join(items)}{draw(gaps)}]"


@st.composite
def documents(draw: st.DrawFn) -> str:
    rows: list[str] = []
    number = 0
    for _ in range(draw(st.integers(0, 4))):
        number += 1
        header = draw(st.sampled_from(["none", "table", "dotted", "array"]))
        name = draw(keys(number))
        if header == "table":
            rows.append(f"[ {name} ] # a table")
        elif header == "dotted":
            rows.append(f"[{name} . {draw(keys(number))}]")
        elif header == "array":
            rows += [f"[[{name}]]", f"[[{name}]]"]
            if draw(st.booleans()):
                rows.append(f"[{name}.inner]")
        for _ in range(draw(st.integers(0, 3))):
            number += 1
            key = draw(keys(number))
            key = f"{key}.{draw(keys(number))}" if draw(st.booleans()) else key
            rows.append(f"{draw(st.sampled_from(['', '  ']))}{key} = {draw(values())} # {key}")
        rows.append(draw(st.sampled_from(["", "# only a comment = 1", "\t"])))
    return "\n".join(rows) + draw(st.sampled_from(["", "\n"]))


@given(documents())
def test_same_keys_as_tomllib(text: str) -> None:
    assert set(key_lines(text)) == paths(tomllib.loads(text))


@given(documents())
def test_lines_hold_their_keys(text: str) -> None:
    """Each key's last part stands on the line given, whatever way it is written."""
    rows = text.split("\n")
    for path, line in key_lines(text).items():
        if isinstance(path[-1], str):
            row = rows[line - 1]
            assert path[-1] in row or basic(path[-1])[1:-1] in row


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("a = 1\nb = 2", ("b",), 2),
        ("[t]\n\n# x = 1\nx = 1", ("t", "x"), 4),
        ("[t]\nx = [\n 1,\n 2,\n]\ny = 1", ("t", "x", 1), 4),
        ("[t]\nx = [\n 1,\n 2,\n]\ny = 1", ("t", "y"), 6),
        ('s = """\na = 1\n"""\nb = 2', ("b",), 4),
        ("t = {x = 1, y = {z = 2}}\nu = 1", ("t", "y", "z"), 1),
        ("t.x = 1\nt.y = 2", ("t", "y"), 2),
        ("t.x = 1\nt.y = 2", ("t",), 1),
        ('"a.b".c = 1\n', ("a.b", "c"), 1),
        ("[[a]]\n[[a]]\nx = 1", ("a", 1, "x"), 3),
        ("a = 1\r\nb = 2\r\n", ("b",), 2),
    ],
)
def test_line(text: str, path: tuple[str | int, ...], line: int) -> None:
    assert key_lines(text)[path] == line
