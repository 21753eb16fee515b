"""A small data set of several shards, built once; tests that damage it take a copy."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tozan import data

WORDS = "登山 mountain summit путь ridge snow camp 山頂 rope 🏔 climb weather rock ice sky dawn".split()  # noqa: SIM905


def made(count: int = 240, seed: int = 1) -> list[data.Document]:
    """Texts of 1 to 900 words with several licences; none of them twice."""
    chance = random.Random(seed)
    texts = []
    for number in range(count):
        words = chance.choices(WORDS, k=chance.randint(1, 900))
        licence = chance.choice(["CC0-1.0", "MIT"])
        texts.append(data.Document(f"text-{number}", f"{number} " + " ".join(words), f"made {seed}", licence))
    return texts


@pytest.fixture(scope="session")
def documents() -> Callable[..., list[data.Document]]:
    return made


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "set"
    data.build(made(), out, vocabulary=400, shard_bytes=1 << 16, validation=0.2)
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "set"))
