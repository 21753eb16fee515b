"""What several benchmarks do alike: make a data set, train by the command line, read what was recorded."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tozan import data


def standard_text(folder: Path, characters: int = 4_000_000, vocabulary: int = 4096) -> Path:
    """A data set of the standard library's text in `folder`/data."""
    data.build(data.corpus.standard_library(limit=characters), folder / "data", vocabulary=vocabulary)
    return folder / "data"


def trained_steps(command: Sequence[str], config: Path, folder: Path, flags: Sequence[str]) -> list[dict[str, Any]]:
    """Run `command` CONFIG into `folder`; what it recorded of each step."""
    subprocess.run([*command, str(config), f"--run.folder={folder}", *flags], check=True)
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "step"]
