"""Ranks that save together: who is done first waits for the others outside of any collective."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import torch
from ranks import spawn

from tozan import checkpoint
from tozan.checkpoint import Saver, State, saver
from tozan.checkpoint.state import Pieces
from tozan.comm import Mesh
from tozan.layout import Layout
from tozan.train.crew import Crew

SLOW_S = 0.6


def _save(folder, slow):
    """What a rank does while the slow one still writes, and the state that it saved."""
    mesh = Mesh.create(Layout(dp=2))
    write, seen = saver.write, []

    def slowly(*arguments):
        if mesh.rank == slow:
            time.sleep(SLOW_S)
        write(*arguments)

    def look():
        seen.append((mesh.ledger.oldest_open() is None, mesh.ledger.listening))

    mine = Pieces.whole(torch.arange(4.0) + mesh.rank)
    with mock.patch.object(saver, "write", slowly), Saver(Path(folder), crew=Crew.of(mesh)) as saving:
        saving.save(State(1, {}, {}, {}, {f"model/{mesh.rank}": mine}))
        looking = threading.Timer(SLOW_S / 2, look)
        looking.start()
        saving.wait()
        looking.join()
    return seen, sorted(checkpoint.load(Path(folder) / "step-00000001").tensors)


def test_no_rank_waits_in_a_collective_for_one_that_still_writes(tmp_path):
    """A collective that waits longer than `layout.timeout` counts as a hang; a slow disk is none."""
    for slow in (0, 1):
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            (first, tensors), (second, _) = spawn(2, _save, folder, slow)
        assert tensors == ["model/0", "model/1"]
        waits = (second if slow == 0 else first)[0]
        assert waits == (True, True)
