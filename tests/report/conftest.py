from collections.abc import Callable
from pathlib import Path

import pytest
from made_run import make_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a run folder of as many steps as asked."""
    return lambda steps=390: make_run(tmp_path / "made", steps)
