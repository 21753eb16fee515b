"""Rows of the published tables: tozan's own, or others with the same columns from a user's folder, checked."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from math import isfinite
from pathlib import Path

from tozan.errors import Problem, UserError
from tozan.files import naming
from tozan.files import read as read_bytes

Row = dict[str, str]
Rows = Sequence[Row]
Each = Callable[[Row], Iterable[object]]
"""What reads one row; it may raise KeyError, ValueError or ZeroDivisionError where it cannot."""

_LARGEST = 1 << 26
"""Bytes of the largest file of rows."""
HELD_OUT = "held out"
"""The use of rows whose file does not say one."""


class _Noted(Row):
    """A row that notes which of its columns are read."""

    def __init__(self, row: Row, columns: set[str]) -> None:
        super().__init__(row)
        self.columns = columns

    def __getitem__(self, column: str) -> str:
        self.columns.add(column)
        return super().__getitem__(column)


def rows(table: str, folder: Path | None = None) -> Rows:
    """The rows of a table as they are in the file.

    Args:
        table: its name.
        folder: of other tables with these names and columns; one that is not there has no rows. None: tozan's own.

    Raises:
        UserError: the file cannot be read, or is not text.
    """
    if folder is None:
        text = (files("tozan.planner") / "tables" / f"{table}.csv").read_text(encoding="utf-8")
        return list(csv.DictReader(text.splitlines()))
    path = folder / f"{table}.csv"
    if not path.exists():
        return []
    with naming(path, "read"):
        raw = read_bytes(path, _LARGEST)
    try:
        found = list(csv.DictReader(raw.decode("utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(Problem(str(path), f"not a table: {error}", "CSV in UTF-8")) from None
    return [{"use": HELD_OUT} | {key: value or "" for key, value in row.items() if key} for row in found]


def check(folder: Path, readers: Mapping[str, Each]) -> None:
    """Find every mistake in a user's rows of these tables.

    A column must be there if reading tozan's own rows takes it, and hold a number above 0 in every row if it does so in
    tozan's own (of at least 0 if one of those is 0).

    Args:
        folder: where the files are.
        readers: what reads a row, by table.

    Raises:
        UserError: for every file that cannot be read, column that is missing and value that cannot be used; or there is
            no row of any table.
    """
    problems, found = [], 0
    for table, each in readers.items():
        try:
            given = rows(table, folder)
        except UserError as error:
            problems += error.problems
            continue
        found += len(given)
        problems += _mistakes(f"{folder}/{table}.csv", rows(table), given, each) if given else []
    if not found and not problems:
        fix = f"files such as {next(iter(readers))}.csv"
        problems = [Problem(f"--tables {folder}", "holds no row of any table that tozan has", fix)]
    if problems:
        raise UserError(*problems)


def _mistakes(path: str, own: Rows, given: Rows, each: Each) -> list[Problem]:
    """What is wrong in one file: columns that are missing, else values."""
    needed = set[str]()
    for row in own:
        list(each(_Noted(row, needed)))
    if missing := sorted(needed - set(given[0])):
        loose = ", ".join(sorted(set(given[0]) - set(own[0]))) or "none"
        what = f"has no column {', '.join(missing)}; columns that its table does not have: {loose}"
        return [Problem(path, what, f"columns named as tozan's are: {', '.join(own[0])}")]
    lowest = {column: low for column in sorted(needed) if (low := _lowest(own, column)) is not None}
    problems = []
    for number, row in enumerate(given, start=2):
        wrong = [f"{name} = {row[name]!r}: {rule}" for name, low in lowest.items() if (rule := _rule(row, name, low))]
        problems += [Problem(f"{path}:{number}", what) for what in wrong or _unread(row, each)]
    return problems


def _lowest(own: Rows, column: str) -> float | None:
    """The lowest number in a column, or None if it holds anything else in any row."""
    try:
        return min(float(row[column]) for row in own)
    except ValueError:
        return None


def _rule(row: Row, column: str, low: float) -> str:
    """The rule that a value breaks, if it breaks one."""
    try:
        value = float(row[column])
    except ValueError:
        return "not a number"
    if isfinite(value) and (value > 0 or (value == 0 and (low == 0 or column == "zero"))):
        return ""
    return f"not a finite number {'of at least' if low == 0 else 'above'} 0"


def _unread(row: Row, each: Each) -> list[str]:
    """What keeps a row from being read, naming the column where the error names the value."""
    try:
        list(each(row))
    except (KeyError, ValueError, ZeroDivisionError) as error:
        value = str(error.args[0]) if isinstance(error, KeyError) else str(error).rpartition(": ")[2].strip("'")
        column = next((name for name, held in row.items() if held and held == value), None)
        if column is None:
            return [f"cannot be priced: {error}"]
        wanted = "not known" if isinstance(error, KeyError) else "not a whole number"
        return [f"{column} = {value!r}: {wanted}"]
    return []
