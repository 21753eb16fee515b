"""A data set without a held-out split, so that runs do nothing but steps, and a machine."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tozan import data


@pytest.fixture(scope="session")
def unheld_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 0.2 MB of the standard library, vocabulary 384, all of it to train on."""
    out = tmp_path_factory.mktemp("data") / "set"
    documents = itertools.islice(data.corpus.standard_library(limit=200_000), 100)
    data.build(documents, out, vocabulary=384, validation=0.0)
    return out


@pytest.fixture
def machine_file() -> str:
    """Any machine: bytes do not depend on it."""
    return "xeon-amx"
