"""A small data set and small configs for tests of the trainer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from tozan import data
from tozan.config import Loaded, load
from tozan.ops import native

CONFIG = """
version = 1
[run]
folder = "{folder}"
[model]
family = "gpt2"
layers = 2
width = 32
heads = 2
sequence = 32
[data]
path = "{data}"
[train]
steps = 6
micro_batch = 2
accumulate = 2
precision = "fp32"
threads = 1
[optim]
lr = 1e-2
warmup = 2
[eval]
samples = 4
"""


@pytest.fixture(autouse=True, scope="module")
def no_peak():
    """The machine's peak, which takes 0.3 s of each run, is not measured: nobody looks at MFU."""
    with patch("tozan.train.machine.measure_gemm_rate", lambda *_: 1e12):
        yield


@pytest.fixture(autouse=True)
def kernels_as_found():
    """What a run chooses holds for its whole process: later tests are to find what they would find alone."""
    yield
    native.choose("auto")


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 0.4 MB of the standard library, vocabulary 384."""
    out = tmp_path_factory.mktemp("data") / "set"
    documents = itertools.islice(data.corpus.standard_library(limit=400_000), 200)
    data.build(documents, out, vocabulary=384, validation=0.2)
    return out


@pytest.fixture
def configure(tmp_path: Path, text_data: Path) -> Callable[..., Loaded]:
    """`configure("--train.steps=3", folder="other")`: a small run in its own folder."""

    def make(*flags: str, folder: str = "run") -> Loaded:
        path = tmp_path / f"{folder}.toml"
        path.write_text(CONFIG.format(folder=tmp_path / folder, data=text_data))
        return load(path, flags)

    return make
