"""What every measurement leaves behind: one JSON file with the machine, the versions, the spread and the repeats.

Torch-free: reports and comparisons read such files on a laptop.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import comb
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tozan import files
from tozan.errors import Problem, UserError

Kind = Literal["gemm", "collectives", "io", "step", "scaling", "doctor"]
CONFIDENCE = 0.95
"""With which `low` and `high` of a row hold the true median between them, given six repeats or more."""

_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Row(_Table):
    """One quantity, measured several times. Fields beyond these are the kind's own: `row["m"]`."""

    model_config = ConfigDict(extra="allow")

    name: str
    """What was measured; unique in its file."""
    unit: str
    """Of the three numbers: `s`, `FLOP/s`, `bytes/s`, `tokens/s`, `1/s`."""
    median: _Finite
    """The middle of the repeats."""
    low: _Finite
    """Lower end of the median's confidence interval (`interval`)."""
    high: _Finite
    """Its upper end."""
    repeats: Annotated[int, Field(ge=1)]
    """How often it was measured, warm-up not counted."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.median <= self.high:
            raise ValueError(f"low {self.low}, median {self.median}, high {self.high} are not in order")
        return self

    @classmethod
    def of(cls, name: str, unit: str, samples: Sequence[float], **own: Any) -> Row:
        """A row from the repeats themselves.

        Args:
            name: what was measured.
            unit: of the samples.
            samples: one or more, in any order.
            own: fields of the kind.
        """
        low, high = interval(samples)
        return cls(name=name, unit=unit, median=median(samples), low=low, high=high, repeats=len(samples), **own)

    def __getitem__(self, field: str) -> Any:
        """A field by its name, the kind's own among them; KeyError if the row has none."""
        if field in type(self).model_fields:
            return getattr(self, field)
        return (self.model_extra or {})[field]

    def get(self, field: str, default: Any = None) -> Any:
        """A field by its name, or `default`."""
        try:
            return self[field]
        except KeyError:
            return default


class Peak(_Table):
    """The best rate of a matrix product in one precision."""

    measured: _Finite
    """FLOP/s, here and in this run."""
    nominal: _Finite | None = None
    """FLOP/s that the cores in use could do: FLOPs a cycle × clock; null where it is not known."""
    how: str = ""
    """What the nominal one is the product of, or why it is not known."""


class Result(_Table):
    """A measurement's file."""

    format: Literal["tozan bench"] = "tozan bench"
    """What the file is."""
    version: Literal[1] = 1
    """Of this form."""
    kind: Kind
    """Which measurement."""
    created: str
    """ISO time."""
    machine: dict[str, Any]
    """Processor, cores and memory (`tozan.train.machine.describe`)."""
    versions: dict[str, str]
    """Of tozan, torch, Python and the kernel."""
    options: dict[str, Any] = {}
    """What was asked for."""
    peaks: dict[str, Peak] = {}
    """By precision."""
    bandwidth: _Finite | None = None
    """Bytes/s of a large copy, read and written bytes counted."""
    rows: list[Row]
    """What was measured."""
    notes: list[str] = []
    """What a reader must know to trust the numbers."""
    facts: dict[str, Any] = {}
    """doctor: what the machine and the process are."""
    problems: list[dict[str, Any]] = []
    """doctor: what is wrong, with its cost and the line that mends it."""

    def row(self, name: str) -> Row:
        """The row of a name.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def json_text(self) -> str:
        """The file's text."""
        return json.dumps(self.model_dump(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, self.json_text().encode())


def read(path: Path) -> Result:
    """Read a measurement.

    Raises:
        UserError: no such file, or none of `tozan bench` in a form that this version reads; every mistake at once.
    """
    with files.naming(path, "read"):
        text = files.read(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(str(path), f"not JSON: {error}", "name a file that `tozan bench` wrote")) from None
    if not isinstance(found, dict) or found.get("format") != "tozan bench":
        raise UserError(Problem(str(path), "no result of `tozan bench`", "name a file that `tozan bench` wrote"))
    if found.get("version") != 1:
        what = f"version {found.get('version')!r} of the form; this tozan reads 1"
        raise UserError(Problem(str(path), what, "use the tozan that wrote it"))
    try:
        return Result.model_validate(found)
    except ValidationError as error:
        raise UserError(
            *(Problem(f"{path}: {'.'.join(map(str, item['loc']))}", item["msg"]) for item in error.errors())
        ) from None


def interval(samples: Iterable[float]) -> tuple[float, float]:
    """The confidence interval of a median, without assuming a distribution.

    The k-th smallest and the k-th largest of n samples enclose the true median with probability 1 − 2·P(fewer than k of
    n fair coins fall heads); the largest k that keeps 95% is taken. Below six samples no k does: smallest and largest.
    (Conover, Practical Nonparametric Statistics, section 3.2.)
    """
    ordered = sorted(samples)
    n, k, outside = len(ordered), 1, 2.0 / 2.0 ** len(ordered)
    while outside + 2 * comb(n, k) / 2**n <= 1 - CONFIDENCE:
        outside += 2 * comb(n, k) / 2**n
        k += 1
    return ordered[k - 1], ordered[n - k]
