"""Forecast bytes are those that the ledgers of real runs count, to the byte, on every rank."""

import json
from pathlib import Path

import pytest
from ranks import spawn

from tozan import models
from tozan.comm import Mesh
from tozan.config import load
from tozan.models.arithmetic import Shape, parameter_shapes
from tozan.planner import predict, traffic
from tozan.train import fit
from tozan.train.run import assemble
from tozan.train.split import mesh_layout

GPT2 = ["--model.family=gpt2"]
LLAMA = ["--model.family=llama", "--model.tied=false", "--model.kv_heads=2"]
BF16 = ["--train.precision=bf16"]
FULL, SELECTIVE = ["--train.recompute=full"], ["--train.recompute=selective"]


def flags(**layout):
    return [f"--layout.{key}={str(value).lower()}" for key, value in layout.items()]


CASES = {
    "dp2": (GPT2, flags(data=2)),
    "dp4": (LLAMA, [*flags(data=4), "--train.deterministic=false"]),
    "dp2-zero1": (GPT2, flags(data=2, zero=1)),
    "dp4-zero2": (LLAMA, flags(data=4, zero=2)),
    "dp2-zero3": (LLAMA, flags(data=2, zero=3) + FULL),
    "dp4-zero1-by2": (GPT2, flags(data=4, zero=1, zero_group=2)),
    "dp4-zero3-by2": (LLAMA, flags(data=4, zero=3, zero_group=2)),
    "dp4-zero1-by2-any": (GPT2, [*flags(data=4, zero=1, zero_group=2), "--train.deterministic=false"]),
    "tp2": (GPT2, flags(tensor=2) + BF16 + FULL),
    "tp4-seq": (GPT2, flags(tensor=2, sequence_parallel=True) + BF16 + SELECTIVE),
    "tp2-seq-llama": (LLAMA, flags(tensor=2, sequence_parallel=True) + FULL),
    "tp4-2d": (GPT2, flags(tensor=4, scheme="2d") + BF16 + FULL),
    "tp4-2d-llama": (LLAMA, flags(tensor=4, scheme="2d") + SELECTIVE),
    "tp8-2.5d": (GPT2, flags(tensor=8, scheme="2.5d", depth=2) + SELECTIVE),
    "tp4-2d-fp16": (GPT2, [*flags(tensor=4, scheme="2d"), "--train.precision=fp16"]),
    "pp2": (GPT2, flags(pipeline=2)),
    "pp4-gpipe": (LLAMA, flags(pipeline=4, schedule="gpipe")),
    "pp2-interleaved": (GPT2, flags(pipeline=2, schedule="interleaved", chunks=2)),
    "pp2-zb-tp2": (GPT2, flags(pipeline=2, schedule="zero-bubble", tensor=2) + BF16),
    "pp2-tp4-2d": (GPT2, flags(pipeline=2, tensor=4, scheme="2d")),
    "pp2-tp2-seq-dp2": (GPT2, flags(pipeline=2, tensor=2, data=2, sequence_parallel=True, zero=1) + BF16),
    "dp2-pp2-interleaved": (GPT2, flags(data=2, pipeline=2, schedule="interleaved", chunks=2)),
    "pp2-dp2-uneven-zero2": (LLAMA, flags(data=2, pipeline=2, zero=2, split=[1, 3])),
    "cp2": (LLAMA, flags(context=2) + BF16 + FULL),
    "dp2-cp2-tp2-zero1": (GPT2, flags(data=2, context=2, tensor=2, zero=1)),
    "cp2-tp2-seq-zero1": (GPT2, flags(context=2, tensor=2, sequence_parallel=True, zero=1)),
    "cp2-pp2-seq": (GPT2, flags(context=2, pipeline=2, tensor=2, sequence_parallel=True) + SELECTIVE),
    "dp2-tp2-seq-zero2": (GPT2, flags(data=2, tensor=2, sequence_parallel=True, zero=2)),
    "dp2-tp2-fp64": (GPT2, [*flags(data=2, tensor=2), "--train.precision=fp64"]),
    "dp2-tp4-2d-zero1": (LLAMA, flags(data=2, tensor=4, scheme="2d", zero=1)),
}

CONFIG = """
version = 1
[run]
folder = "{folder}"
[model]
layers = 4
width = 32
heads = 4
mlp_width = 64
vocabulary = 384
sequence = 16
[data]
path = "{data}"
[train]
steps = 1
micro_batch = 4
accumulate = 4
precision = "fp32"
threads = 1
[checks]
memory = "off"
"""

OUTSIDE = ("checkpoint", "GPUs", "kernels")
"""Names of what is sent outside of steps: a few bytes by which ranks agree on a checkpoint, devices and kernels."""


def run_rank(path: Path, words: list[str]) -> None:
    loaded = load(path, words)
    fit(assemble(loaded, Mesh.create(mesh_layout(loaded.config), timeout_s=60)))


@pytest.mark.parametrize("name", CASES)
def test_the_ledger_counts_what_was_forecast(name, unheld_data, machine_file, tmp_path):
    model, words = CASES[name]
    folder, path = tmp_path / "run", tmp_path / "run.toml"
    path.write_text(CONFIG.format(folder=folder, data=unheld_data))
    config = load(path, [*model, *words]).config
    spawn(config.layout.processes, run_rank, path, [*model, *words], timeout=300.0)
    forecast = predict(config, machine_file)
    for rank in range(config.layout.processes):
        books = traffic.books(forecast.trip, rank)
        steps = config.train.steps
        expected = {key: (steps * sent, steps * books.calls[key]) for key, sent in forecast.traffic(rank).items()}
        assert ledger(folder / "ledger" / f"rank-{rank:06d}.jsonl") == expected, rank


def ledger(path: Path) -> dict[tuple[str, str, str], tuple[int, int]]:
    """Bytes and calls by axis, operation and name; what sent nothing is left out."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        (line["axis"], line["operation"], line["name"]): (line["bytes"], line["count"])
        for line in lines
        if line["bytes"] and not line["name"].startswith(OUTSIDE)
    }


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_shapes_are_the_models(family, tied):
    shape = Shape(family, 2, 32, 4, 2, 48, 100, 16, tied)
    model = models.skeleton(shape)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert list(parameter_shapes(shape).items()) == list(expected.items())
