"""What a run writes down: `metrics.jsonl` always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tozan.config.schema import Config
from tozan.errors import Problem, UserError

Record = dict[str, Any]


class Sink(Protocol):
    """A place records go to."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Flush and release."""


class Jsonl:
    """One JSON object a line, appended. A number that is not finite is written as null: JSON has no word for it.

    Args:
        path: the file.
        hold: seconds for which lines may stay in this process before they are handed to the kernel.
    """

    def __init__(self, path: Path, hold: float = 0.0) -> None:
        self._hold, self._flushed = hold, time.monotonic()
        # A killed writer may have left half a line; what follows must not be glued to it.
        torn = path.exists() and path.stat().st_size > 0 and _last_byte(path) != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def write(self, record: Record) -> None:
        """Append, and hand the line to the kernel so that a killed process does not lose it."""
        self._file.write(json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n")
        now = time.monotonic()
        if now - self._flushed >= self._hold:
            self._file.flush()
            self._flushed = now

    def close(self) -> None:
        """Force everything to disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


class TensorBoard:
    """Scalars of each record as TensorBoard events under `<run>/tensorboard`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _not_installed("metrics.tensorboard", "tensorboard") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, record: Record) -> None:
        """Write every finite number of the record under its kind."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class Wandb:
    """Scalars of each record to a Weights & Biases project."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise _not_installed("metrics.wandb", "wandb") from None
        self._run = wandb.init(project=project, dir=str(folder), name=folder.name, config=dict(config))

    def write(self, record: Record) -> None:
        """Log every finite number of the record."""
        self._run.log({**scalars(record), "step": record["step"]})

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


class Metrics:
    """All sinks of a run behind one `write`."""

    def __init__(self, sinks: list[Sink], on_record: Callable[[Record], None] | None = None) -> None:
        self._sinks = sinks
        self._on_record = on_record or (lambda _: None)

    @classmethod
    def open(cls, folder: Path, config: Config, on_record: Callable[[Record], None] | None) -> Metrics:
        """Open what `[metrics]` asks for.

        Raises:
            UserError: a library that the config asks for is not installed.
        """
        sinks: list[Sink] = [Jsonl(folder / "metrics.jsonl")]
        if config.metrics.tensorboard:
            sinks.append(TensorBoard(folder))
        if config.metrics.wandb is not None:
            sinks.append(Wandb(folder, config.metrics.wandb, config.model_dump()))
        return cls(sinks, on_record)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Write one record to every sink.

        Args:
            kind: `step`, `eval` or `event`.
            step: optimizer steps done.
            values: the record's other fields.
        """
        record = {"kind": kind, "step": step, **values}
        for sink in self._sinks:
            sink.write(record)
        self._on_record(record)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def finite(value: Any) -> Any:
    """`value` with each NaN and infinity, at any depth, replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def scalars(record: Record) -> dict[str, float]:
    """The finite numbers of a record as `{kind/name: value}`, phases as `{kind/phases/name: value}`."""
    flat = {**record, **{f"phases/{name}": value for name, value in record.get("phases", {}).items()}}
    return {
        f"{record['kind']}/{name}": float(value)
        for name, value in flat.items()
        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _not_installed(field: str, extra: str) -> UserError:
    return UserError(Problem(field, f"asks for {extra}, which is not installed", f"pip install 'tozan[{extra}]'"))
