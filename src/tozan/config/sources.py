"""Where values come from: a TOML file and `--table.key value` flags, each value kept with its place."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tozan.config import lines
from tozan.config.fields import Field, fields, nearest_key, nearest_table, show, tables, toml_string
from tozan.errors import Problem

LONGEST_LINE = 10_000
"""Characters in a line of TOML."""
LARGEST_FILE = 1 << 20
"""Bytes. A config is a page or two; a larger file is something else, such as a checkpoint."""


@dataclass(frozen=True)
class Written:
    """A value that somebody wrote: the value and its place (`run.toml:12`, `--optim.lr`, `preset gpt2-124m`)."""

    value: Any
    origin: str


@dataclass
class Source:
    """What one source says.

    Attributes:
        values: known keys (`optim.lr`) and what is written for them, of right type or not.
        problems: what could not be understood.
        headers: places of the tables it opens, by name.
        guessed: keys that unknown ones probably stand for.
    """

    values: dict[str, Written] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    guessed: set[str] = field(default_factory=set)

    def refuse(self, key: str, value: object, origin: str) -> None:
        """Record a key that no table has."""
        self.problems.append(unknown_key(key, value, origin))
        self.guessed |= {nearest_key(key) or key}


def snippet(spec: Field, value: object, origin: str) -> str:
    """How to write `value` for a field in the place that `origin` names: a TOML line, or a flag."""
    if origin.startswith("--"):
        text = str(value) if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) else show(value)
        return f"--{spec.key} {text if spec.kind != 'array' else repr(text)}"
    return f"{spec.name} = {show(value)}"


def bounded(text: str) -> str:
    """The text, if a TOML parser can be trusted with it: a key of very many parts takes memory by their square.

    Raises:
        ValueError: a line is too long.
    """
    longest = max(map(len, text.splitlines()), default=0)
    if longest > LONGEST_LINE:
        raise ValueError(f"has a line of {longest:,} characters; at most {LONGEST_LINE:,} make sense")
    return text


def read_file(path: Path) -> Source:
    """What a config file says; problems instead of exceptions, whatever the file holds."""
    source = Source()
    try:
        if not path.is_file():
            raise ValueError("is no plain file") if path.exists() else FileNotFoundError(2, "No such file or directory")
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"is {path.stat().st_size:,} bytes long; a config has at most {LARGEST_FILE:,}")
        text = bounded(path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n"))
    except (OSError, ValueError) as error:
        source.problems.append(_unreadable(path, error))
        return source
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        source.problems.append(_syntax(path, text, error))
        return source
    where = {key: f"{path}:{line}" for key, line in lines.key_lines(text).items()}
    for name, value in tree.items():
        if name in tables():
            _read_table(source, name, value, where)
        elif name in fields():
            source.values[name] = Written(value, where[(name,)])
        else:
            source.problems.append(_unknown_top(name, value, where[(name,)]))
            source.guessed |= {nearest_key(name) or name}
            if isinstance(value, dict):
                source.guessed |= {f"{nearest_table(name)}.{inner}" for inner in value}
    return source


def _read_table(source: Source, table: str, value: object, where: Mapping[lines.Path, str]) -> None:
    if not isinstance(value, dict):
        head = f"[{table}]" if not isinstance(value, list) else f"[{table}] with single brackets"
        what = f"{table} is {show(value)}, but it is a table: {tables()[table]}"
        source.problems.append(Problem(where[(table,)], what, f"write {head} on a line of its own, its keys below"))
        return
    source.headers[table] = where[(table,)]
    for name, entry in value.items():
        key = f"{table}.{name}"
        if key in fields():
            source.values[key] = Written(entry, where[table, name])
        else:
            source.refuse(key, entry, where[table, name])


def unknown_key(key: str, value: object, origin: str) -> Problem:
    """The answer to a key that no table has: the name most likely meant, and where it belongs."""
    table, _, name = key.rpartition(".")
    what = f"there is no key {show(name)[1:-1]} in [{table}]"
    near = nearest_key(key)
    if near is None:
        names = ", ".join(spec.name for spec in fields().values() if spec.table == table)
        return Problem(origin, what, f"[{table}] has: {names}")
    spec = fields()[near]
    if origin.startswith("--"):
        return Problem(origin, what, f"did you mean --{near}? {spec.text}")
    place = "" if spec.table == table else f" under [{spec.table}]" if spec.table else " above all tables"
    written = show(value) if not isinstance(value, dict | list) else "…"
    return Problem(origin, what, f"did you mean `{spec.name} = {written}`{place}? {spec.text}")


def _unknown_top(name: str, value: object, origin: str) -> Problem:
    """The answer to an unknown table, or to a key that stands outside its table."""
    shown = show(name)[1:-1]
    if isinstance(value, dict | list):
        near = nearest_table(name)
        fix = f"did you mean [{near}]?" if near else f"the tables are {', '.join(f'[{table}]' for table in tables())}"
        return Problem(origin, f"there is no table [{shown}]", fix)
    near = nearest_key(name)
    if near is None or not fields()[near].table:
        names = ", ".join(f"[{table}]" for table in tables())
        fix = f"did you mean `{near} = {show(value)}`?" if near else f"only `version` stands above the tables {names}"
        return Problem(origin, f"there is no key {shown} outside the tables", fix)
    spec = fields()[near]
    what = f"{shown} stands outside the tables"
    return Problem(origin, what, f"write `{spec.name} = {show(value)}` under [{spec.table}]")


def _unreadable(path: Path, error: Exception) -> Problem:
    if isinstance(error, FileNotFoundError):
        known = sorted(str(p) for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), known, 1, 0.5) or known[:5]
        fix = f"did you mean {' or '.join(near)}?" if near else "`tozan config schema --page` says what a config holds"
        return Problem(str(path), "there is no such file", fix)
    if isinstance(error, IsADirectoryError) or path.is_dir():
        return Problem(str(path), "is a folder, but a config is a TOML file", "name the .toml file inside it")
    if isinstance(error, UnicodeDecodeError):
        what = f"is not UTF-8 text (byte {error.start}), but a config is a TOML file"
        return Problem(str(path), what, "name a .toml file, saved as UTF-8")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Problem(str(path), f"cannot be read as a config: {reason}", "name a .toml file that you may read")


def _syntax(path: Path, text: str, error: Exception) -> Problem:
    """A file that is not TOML: line, column, what stands there, and the slip that most often leads to it."""
    if isinstance(error, RecursionError):
        return Problem(str(path), "not valid TOML: brackets nested too deeply", "write each list on a single level")
    message = str(error)
    place = re.search(r" ?\(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    if place is None:
        return Problem(str(path), f"not valid TOML: {message}", "write numbers of at most 18 digits")
    rows = text.split("\n")
    line = int(place[1]) if place[1] else max(len(text.rstrip("\n").split("\n")), 1)
    row = rows[line - 1] if line <= len(rows) else ""
    column = int(place[2]) if place[2] else len(row) + 1
    what = f"not valid TOML: {message[: place.start()]}: `{row.strip()[:80]}`"
    return Problem(f"{path}:{line}:{column}", what, _syntax_hint(row, message))


def _syntax_hint(row: str, message: str) -> str:
    name, equals, value = (part.strip() for part in row.partition("="))
    if message.startswith(("Cannot overwrite", "Cannot declare", "Cannot mutate")):
        return "write each key and each table once"
    if not equals and re.match(r"[\w.-]+\s*:", name):
        key, _, rest = name.partition(":")
        return f"TOML has an equals sign: {key.strip()} = {rest.strip() or '…'}"
    if name.startswith("[") and not name.endswith("]"):
        return f"close the table's name: {name.split('#')[0].strip()}]"
    if not equals:
        return "each line is `key = value`, `[table]` or `# comment`"
    value = value.split("#")[0].strip()
    if value.lower() in ("true", "false"):
        return f"in small letters: {name} = {value.lower()}"
    if value.lower() in ("", "none", "null", "~"):
        return f"TOML has no empty value: leave {name} out to take its default"
    if re.fullmatch(r"[-+]?\.\d+(?:[eE][-+]?\d+)?", value):
        return f"with a digit before the point: {name} = {value.replace('.', '0.', 1)}"
    if re.fullmatch(r"[-+]?\d+\.(?:[eE][-+]?\d+)?", value):
        return f"with a digit after the point: {name} = {value.replace('.', '.0', 1)}"
    if re.fullmatch(r"[-+]?0+\d+", value):
        return f"without leading zeros: {name} = {int(value)}"
    if re.fullmatch(r"[-+]?\d+(,\d{3})+", value):
        return f"with underscores instead of commas: {name} = {value.replace(',', '_')}"
    if value[0] in "\"'":
        return "text ends with the quote that it began with, on the same line"
    if value[0] == "[":
        return "close the list with ]"
    return f"text needs quotes: {name} = {toml_string(value)}"


def read_flags(flags: Sequence[str] | Mapping[str, Any]) -> Source:
    """What `--table.key value` and `--table.key=value` say; of a flag written twice, the later one counts.

    Values are TOML values, but text needs no quotes. A switch may stand alone: `--train.compile` means true. A mapping
    `{"optim.lr": 1e-3}` is taken too, for notebooks.
    """
    source = Source()
    if isinstance(flags, Mapping):
        for key, value in flags.items():
            _take(source, str(key), value, f"argument {key}")
        return source
    waiting = list(flags)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or word == "--":
            fix = f"write --table.key {word}, such as --optim.lr 1e-3"
            source.problems.append(Problem(f"argument {show(word)}", "a value without a flag", fix))
            continue
        name, equals, value = word[2:].partition("=")
        spec = fields().get(name)
        alone = not equals and (not waiting or waiting[0].startswith("--"))
        if not equals and not alone:
            value = waiting.pop(0)
        if alone and spec is not None and spec.kind == "boolean":
            _take(source, name, True, f"--{name}")
        elif alone and spec is not None:
            fix = f"write {snippet(spec, spec.example or spec.default, '--')}"
            source.problems.append(Problem(f"--{name}", f"has no value; it takes {spec.allowed()}", fix))
        else:
            _take(source, name, value if spec is None else parse_value(spec, value), f"--{name}")
    return source


def _take(source: Source, key: str, value: object, origin: str) -> None:
    """Record a value, or the problem with its key."""
    table = key.partition(".")[0]
    if key in fields():
        source.values[key] = Written(value, origin)
    elif key in tables():
        example = next(spec.key for spec in fields().values() if spec.table == key)
        source.problems.append(Problem(origin, f"{key} is a table", f"set its keys one by one, such as --{example}"))
    elif "." not in key or table not in tables():
        near = nearest_key(key)
        fix = f"did you mean --{near}? {fields()[near].text}" if near else "the flags are --table.key value"
        source.problems.append(Problem(origin, f"there is no key {show(key)[1:-1]}", fix))
        source.guessed |= {near or key}
    else:
        source.refuse(key, value, origin)


def parse_value(spec: Field, text: str) -> Any:
    """A flag's value by the field's type; text that is no TOML value stays text, for the type check to answer."""
    if spec.kind == "string" and text[:1] not in ('"', "'"):
        return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text
