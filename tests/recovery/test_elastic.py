"""The layout for fewer ranks: of those that can be had, the one that the planner calls the fastest."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import pytest
from tests.planner.test_local import machine as made_machine

from tozan.config import load
from tozan.errors import UserError
from tozan.models.arithmetic import resolve
from tozan.planner import predict
from tozan.planner.machine import load as load_machine
from tozan.recovery import elastic
from tozan.recovery.elastic import fitting, shrunk
from tozan.train import require_fit

CONFIG = """version = 1
[run]
folder = "{folder}"
[model]
family = "gpt2"
layers = 6
width = 512
heads = 8
sequence = 256
vocabulary = 8192
[data]
path = "none"
[train]
steps = 10
global_batch = 24
micro_batch = 1
[recovery]
machine = "{machine}"
"""
OWN = [
    (["--layout.data=8"], 7),
    (["--layout.data=4", "--layout.zero=1"], 3),
    (["--layout.data=2", "--layout.pipeline=4"], 7),
    (["--layout.pipeline=6"], 4),
    (["--layout.data=2", "--layout.tensor=4", "--layout.sequence_parallel=true"], 7),
    (["--layout.tensor=4", "--train.deterministic=false"], 3),
    (["--layout.data=3", "--layout.pipeline=2", "--layout.tensor=2", "--layout.zero=2"], 9),
    (["--layout.pipeline=3", "--layout.split=[1, 2, 3]", "--layout.data=2"], 5),
]


def write(folder: Path, machine: str) -> Path:
    path = folder / "run.toml"
    path.write_text(CONFIG.format(folder=folder / "run", machine=machine))
    return path


def everything(path: Path, own: list[str], ranks: int, machine: str) -> list[float]:
    """Seconds by the planner of every layout there is with the same batches, and bits if they are promised."""
    before, found = load(path, own).config, []
    same = before.train.deterministic and before.layout.tensor <= ranks
    tensors = [before.layout.tensor] if same else [t for t in (1, 2, 4) if before.layout.tensor % t == 0]
    for data, pipeline, tensor, zero in itertools.product((1, 2, 3, 4, 6, 8), range(1, 7), tensors, range(4)):
        if data * pipeline * tensor > ranks or (data == 1 and zero != before.layout.zero):
            continue
        flags = [f"--layout.data={data}", f"--layout.pipeline={pipeline}", f"--layout.tensor={tensor}"]
        flags += [f"--layout.zero={zero}", f"--train.accumulate={24 // data}"]
        flags += ["--layout.sequence_parallel=false"] if tensor == 1 else []
        flags += ["--layout.split=[]"] if pipeline != before.layout.pipeline else []
        with contextlib.suppress(UserError):
            found.append(predict(load(path, [*own, *flags]).config, machine).seconds)
    return found


@pytest.mark.parametrize(("own", "ranks"), OWN, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_it_is_the_fastest_that_the_planner_knows(tmp_path, own, ranks):
    machine = "fugaku-2.0" if ranks % 2 else "a100-80"
    path = write(tmp_path, machine)
    chosen = fitting(path, own, ranks)
    config = load(path, [*own, *chosen.flags]).config
    assert config.layout.processes == chosen.ranks <= ranks
    assert (config.train.global_batch, config.train.micro_batch) == (24, 1)
    require_fit(config, resolve(config.model, None), "layout")
    assert chosen.seconds == predict(config, machine).seconds == min(everything(path, own, ranks, machine))


@pytest.fixture
def on(monkeypatch):
    """`on(machine)`: what the planner takes the machine to be."""
    return lambda machine: monkeypatch.setattr(elastic, "machine_of", lambda _: machine)


def test_it_fits_in_memory(tmp_path, on):
    path, own = write(tmp_path, "fugaku-2.0"), ["--layout.data=8"]
    roomy = load_machine("fugaku-2.0")
    shapes = list(shrunk(load(path, own).config, 6))
    held = {id(config): sum(predict(config, roomy).memory.values()) for config in shapes}
    limit = 1.05 * min(held.values())
    on(roomy.changed(device={"memory": limit}))
    tight = fitting(path, own, 6)
    assert sum(predict(load(path, [*own, *tight.flags]).config, roomy).memory.values()) <= limit
    assert tight.seconds > fitting_on(roomy, on, path, own, 6).seconds
    on(roomy.changed(device={"memory": 0.9 * min(held.values())}))
    assert fitting(path, own, 6).seconds is None  # nothing fits: the nearest


def fitting_on(machine, on, path, own, ranks):
    on(machine)
    return fitting(path, own, ranks)


def test_on_a_measured_machine_ranks_share_memory_and_cores(tmp_path, on):
    path, own = write(tmp_path, "xeon-amx"), ["--layout.data=4", "--train.precision=bf16"]
    measured = made_machine(cores=4)
    found = fitting_on(measured, on, path, own, 3)
    shapes = list(shrunk(load(path, own).config, 3))
    assert found.seconds == min(predict(config, measured).seconds for config in shapes)
    whole = predict(load(path, [*own, *found.flags]).config, measured).memory
    on(measured.changed(device={"memory": 0.99 * found.ranks * sum(whole.values())}))
    assert fitting(path, own, 3).flags != found.flags
    assert fitting(path, own, 3, together=1).flags == found.flags  # a rank on each node


def test_where_the_planner_cannot_price_the_layout_is_the_nearest(tmp_path, capfd):
    path = write(tmp_path, "nowhere.toml")
    found = fitting(path, ["--layout.data=8"], 7)
    assert (found.ranks, found.seconds) == (6, None)
    assert "--layout.data=6" in found.flags
    assert "nowhere.toml" in capfd.readouterr().err
