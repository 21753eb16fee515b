"""The trainer under every kind of layout: the same losses, norms and checkpoints as one process."""

import json
from pathlib import Path

import pytest
import torch
from ranks import spawn

from tozan import checkpoint
from tozan.comm import Mesh
from tozan.config import load
from tozan.errors import UserError
from tozan.train import fit, train
from tozan.train.run import assemble, shape_of
from tozan.train.split import mesh_layout, require_fit

GPT2 = ["--model.family=gpt2", "--model.tied=true"]
LLAMA = ["--model.family=llama", "--model.tied=false", "--model.kv_heads=2"]
STEPS = 4
FP32_BOUND = 2e-4
"""Largest relative difference of a loss or norm after 4 steps in fp32, where sums run in another order."""

BITWISE = {
    "dp2": ["--layout.data=2"],
    "dp4": ["--layout.data=4"],
    "dp2-zero1": ["--layout.data=2", "--layout.zero=1"],
    "dp2-zero2": ["--layout.data=2", "--layout.zero=2"],
    "dp2-zero3": ["--layout.data=2", "--layout.zero=3"],
    "dp4-zero1-by2": ["--layout.data=4", "--layout.zero=1", "--layout.zero_group=2"],
    "dp4-zero3": ["--layout.data=4", "--layout.zero=3"],
    "dp4-zero3-by2": ["--layout.data=4", "--layout.zero=3", "--layout.zero_group=2"],
    "pp2": ["--layout.pipeline=2"],
    "pp4-gpipe": ["--layout.pipeline=4", "--layout.schedule=gpipe"],
    "pp2-interleaved": ["--layout.pipeline=2", "--layout.schedule=interleaved", "--layout.chunks=2"],
    "pp2-zb": ["--layout.pipeline=2", "--layout.schedule=zero-bubble"],
}
WITHIN = {
    "tp2": ["--layout.tensor=2"],
    "tp2-seq": ["--layout.tensor=2", "--layout.sequence_parallel=true"],
    "tp4-2d": ["--layout.tensor=4", "--layout.scheme=2d"],
    "tp8-2.5d": ["--layout.tensor=8", "--layout.scheme=2.5d", "--layout.depth=2"],
    "dp2-tp2": ["--layout.data=2", "--layout.tensor=2"],
    "dp2-tp2-seq-zero2": ["--layout.data=2", "--layout.tensor=2", "--layout.sequence_parallel=true", "--layout.zero=2"],
    "dp2-tp4-2d-zero1": ["--layout.data=2", "--layout.tensor=4", "--layout.scheme=2d", "--layout.zero=1"],
    "dp2-pp2": ["--layout.data=2", "--layout.pipeline=2"],
    "dp2-pp2-zero1": ["--layout.data=2", "--layout.pipeline=2", "--layout.zero=1"],
    "tp2-pp2": ["--layout.tensor=2", "--layout.pipeline=2"],
    "dp2-tp2-pp2": ["--layout.data=2", "--layout.tensor=2", "--layout.pipeline=2"],
}
LAYOUTS = BITWISE | WITHIN

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
steps = {steps}
global_batch = 16
precision = "fp32"
threads = 1
[optim]
lr = 1e-2
warmup = 1
clip = 0.5
[eval]
every = 2
samples = 8
"""


def write(folder: Path, data: Path, steps: int = STEPS) -> Path:
    path = folder.with_suffix(".toml")
    path.write_text(CONFIG.format(folder=folder, data=data, steps=steps))
    return path


def flags_of(name: str, model: list[str]) -> list[str]:
    """Equal micro-batching for data layouts (2 samples each); rows for the grids of 2D and 2.5D."""
    flags = LAYOUTS.get(name, [])
    return [*model, *flags, f"--train.micro_batch={4 if '2d' in name or '2.5d' in name else 2}"]


def processes(flags: list[str]) -> int:
    sizes = dict(flag.removeprefix("--layout.").split("=") for flag in flags if flag.startswith("--layout."))
    return int(sizes.get("data", 1)) * int(sizes.get("tensor", 1)) * int(sizes.get("pipeline", 1))


def run_rank(path: Path, flags: list[str]) -> None:
    loaded = load(path, flags)
    mesh = Mesh.create(mesh_layout(loaded.config), timeout_s=60)
    fit(assemble(loaded, mesh))


def run(path: Path, flags: list[str]) -> None:
    size = processes(flags)
    if size == 1:
        train(load(path, flags))
    else:
        spawn(size, run_rank, path, flags)


def curves(folder: Path) -> dict[str, list[float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {r["step"]: r for r in records if r["kind"] == "step"}
    evals = {r["step"]: r for r in records if r["kind"] == "eval"}
    return {
        "loss": [steps[s]["loss"] for s in sorted(steps)],
        "norm": [steps[s]["grad_norm"] for s in sorted(steps)],
        "tokens": [steps[s]["tokens"] for s in sorted(steps)],
        "held out": [evals[s]["loss"] for s in sorted(evals)],
    }


def final(folder: Path) -> checkpoint.State:
    return checkpoint.load(checkpoint.resolve(folder))


@pytest.fixture(scope="module")
def references(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One process, per model family."""
    base = tmp_path_factory.mktemp("one")
    for name, model in (("gpt2", GPT2), ("llama", LLAMA)):
        run(write(base / name, text_data), flags_of("one", model))
    return {name: base / name for name in ("gpt2", "llama")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_process_does(name, references, text_data, tmp_path):
    family, model = ("llama", LLAMA) if sorted(LAYOUTS).index(name) % 2 else ("gpt2", GPT2)
    folder = tmp_path / name
    run(write(folder, text_data), flags_of(name, model))
    got, expected = curves(folder), curves(references[family])
    state, reference = final(folder), final(references[family])
    assert got["tokens"] == expected["tokens"]
    assert state.meta["samples"] == reference.meta["samples"] == 16 * STEPS
    if name in BITWISE:
        assert got == expected
        assert checkpoint.state_hash(state.tensors) == checkpoint.state_hash(reference.tensors)
        return
    for key in ("loss", "norm", "held out"):
        assert got[key] == pytest.approx(expected[key], rel=FP32_BOUND), key
    for tensor_name, tensor in reference.tensors.items():
        if tensor_name.startswith("model/"):
            torch.testing.assert_close(state.tensors[tensor_name], tensor, rtol=0, atol=2e-3)


@pytest.mark.parametrize("saved", ["one", "dp2-zero3", "dp2-tp2-pp2", "tp4-2d"])
@pytest.mark.parametrize("loaded", ["one", "dp4-zero1-by2", "dp2-tp2-seq-zero2", "pp2-interleaved", "tp8-2.5d"])
def test_a_checkpoint_of_any_layout_loads_into_any_other(saved, loaded, text_data, tmp_path):
    folder = tmp_path / "run"
    path = write(folder, text_data, steps=1)
    run(path, [*flags_of(saved, GPT2), "--optim.warmup=0"])
    before = final(folder)
    size_flags = [*flags_of(loaded, GPT2), "--optim.warmup=0"]
    again = save_again(path, size_flags)
    assert checkpoint.state_hash(again.tensors) == checkpoint.state_hash(before.tensors)
    assert again.meta == before.meta
    assert again.step == before.step


def save_again(path: Path, flags: list[str]) -> checkpoint.State:
    """The state that a layout holds after loading, gathered on rank 0."""
    size = processes(flags)
    out = path.parent / "again"
    if size == 1:
        _save_again(path, flags, out)
    else:
        spawn(size, _save_again_rank, path, flags, out)
    return checkpoint.load(checkpoint.resolve(out))


def _save_again(path: Path, flags: list[str], out: Path, mesh: Mesh | None = None) -> None:
    resumed = assemble(load(path, flags), mesh)
    state = resumed.state()
    if resumed.writes:
        checkpoint.save(out, state)


def _save_again_rank(path: Path, flags: list[str], out: Path) -> None:
    _save_again(path, flags, out, Mesh.create(mesh_layout(load(path, flags).config), timeout_s=60))


def check(path: Path, flags: list[str]) -> None:
    loaded = load(path, flags)
    require_fit(loaded.config, shape_of(loaded), "run.toml")


BAD = {
    "heads 4 ÷ tp 3": ["--layout.tensor=3"],
    "6 pieces of a model of 4 layers": ["--layout.pipeline=6"],
    "layout.tensor 6 is not q × q": ["--layout.tensor=6", "--layout.scheme=2d"],
    "zero 2 with pipeline 2": ["--layout.data=2", "--layout.pipeline=2", "--layout.zero=2"],
    "zero_group 3 leaves 1 over": ["--layout.data=4", "--layout.zero=1", "--layout.zero_group=3"],
    "sequence_parallel with tensor 1": ["--layout.sequence_parallel=true"],
    "dropout 0.1 with pp 2": ["--layout.pipeline=2", "--model.dropout=0.1"],
    "chunks 2 with schedule 1f1b": ["--layout.pipeline=2", "--layout.chunks=2"],
    "micro_batch 3 ÷ 2 grid rows": ["--layout.tensor=4", "--layout.scheme=2d", "--train.global_batch=3"],
    "global_batch 16": ["--layout.data=3"],
}


@pytest.mark.parametrize("said", BAD)
def test_a_layout_that_makes_no_sense_is_refused_with_its_arithmetic(said, text_data, tmp_path):
    path = write(tmp_path / "run", text_data)
    with pytest.raises(UserError) as caught:
        check(path, BAD[said])
    assert said in str(caught.value)
    assert any(problem.fix for problem in caught.value.problems)
