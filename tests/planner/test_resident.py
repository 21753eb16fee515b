"""Tensors of real steps, counted by the allocator at their fullest moment, beside the forecast."""

from pathlib import Path

import pytest
import torch
from ranks import spawn

from tozan.bench import step
from tozan.comm import Mesh
from tozan.config import load
from tozan.ops import native, products
from tozan.planner.machine import load as machine
from tozan.planner.predict import trip_of
from tozan.planner.resident import resident
from tozan.train.split import mesh_layout

SMALL = (
    *("--version=1", "--data.path=random", "--train.steps=1", "--train.micro_batch=4", "--checks.outlier=0"),
    *("--model.layers=4", "--model.width=256", "--model.heads=4", "--model.sequence=256", "--model.vocabulary=4096"),
)


def most_held(flags: tuple[str, ...], folder: Path) -> int:
    """Bytes of this rank's tensors at the fullest moment of a step."""
    config = load(None, [*SMALL, *flags]).config
    mesh = Mesh.create(mesh_layout(config))
    assert native.arena() == native.ARENA
    before = native.arena_bytes()[0]
    run = step.assemble(config, folder, mesh)
    native.arena_bytes(again=True)
    for _ in range(config.train.steps):
        step.lap(run)
    return native.arena_bytes()[1] - before


@pytest.mark.parametrize(
    "layout",
    [
        ["--layout.data=2", "--train.accumulate=2"],
        ["--layout.data=2", "--layout.zero=3", "--train.accumulate=2", "--model.family=llama"],
        ["--layout.pipeline=2", "--layout.schedule=zero-bubble", "--train.accumulate=4"],
    ],
    ids=["replicas", "zero 3", "zero bubble"],
)
def test_no_more_and_hardly_less_is_held_than_forecast(layout, tmp_path):
    found = max(spawn(2, most_held, layout, tmp_path))
    any_other = machine("xeon-amx")
    device = any_other.device.model_copy(update={"weight_copies": not products.pays(torch.bfloat16)})
    parts = resident(trip_of(load(None, [*SMALL, *layout]).config), any_other.model_copy(update={"device": device}))
    assert found == pytest.approx(sum(parts.values()) - parts["reserve"], rel=0.08)
