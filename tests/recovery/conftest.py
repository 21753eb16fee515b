"""A small data set and small runs for tests of agents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tozan import data
from tozan.chaos.run import CONFIG

STEPS = 120


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`configure("name")` writes the config of a run in the folder `name` beside it; without checkpoints on the way."""
    folder = tmp_path_factory.mktemp("runs")
    data.build(list(data.corpus.standard_library(limit=200_000))[:100], folder / "data", vocabulary=384, validation=0.1)

    def make(name: str) -> Path:
        path = folder / f"{name}.toml"
        text = CONFIG.format(folder=folder / name, data=folder / "data", steps=STEPS)
        text = text.replace("every = 10", "every = 0").replace("stopped = 0.25", "stopped = 60")
        path.write_text(text + "wait = 120\nneighbour = 4\n")
        return path

    return make
