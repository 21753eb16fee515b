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
FAMILIES = {"gpt2": GPT2, "llama": LLAMA}
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
    path = folder.with_name(folder.name + ".toml")
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
    for name, model in FAMILIES.items():
        run(write(base / name, text_data), flags_of("one", model))
    return {name: base / name for name in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_process_does(name, family, references, text_data, tmp_path):
    model = FAMILIES[family]
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


MATRIX = ["one", "dp2", "dp4-zero1-by2", "dp2-zero3", "tp2-seq", "tp4-2d", "tp8-2.5d", "pp2-interleaved", "dp2-tp2-pp2"]
MATRIX += ["dp2-tp2-seq-zero2"]
"""Saved under each of these and loaded under each of these."""


@pytest.fixture(scope="module")
def saved(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The config of a run of one step per layout, with its checkpoint beside it."""
    base = tmp_path_factory.mktemp("saved")
    configs = {name: write(base / name, text_data, steps=1) for name in MATRIX}
    for name, path in configs.items():
        run(path, [*flags_of(name, GPT2), "--optim.warmup=0"])
    return configs


@pytest.mark.parametrize("name", MATRIX)
def test_a_checkpoint_of_any_layout_loads_into_any_other(name, saved, tmp_path):
    """Every rank takes its pieces; what they make together has the saved hash and the saved position in the data."""
    flags = [*flags_of(name, GPT2), "--optim.warmup=0"]
    size = processes(flags)
    if size == 1:
        again = load_and_hash(list(saved.values()), flags)
    else:
        again = spawn(size, load_and_hash, list(saved.values()), flags, timeout=200.0)[0]
    for path, (found, meta, step) in zip(saved.values(), again, strict=True):
        before = final(path.with_name(path.name.removesuffix(".toml")))
        assert found == checkpoint.state_hash(before.tensors), path.stem
        assert meta == before.meta
        assert step == before.step == 1


def load_and_hash(configs: list[Path], flags: list[str]) -> list[tuple[str, dict, int]]:
    """Hash, meta and step that this layout holds after loading each run's checkpoint, gathered on rank 0."""
    results = []
    for path in configs:
        loaded = load(path, flags)
        resumed = assemble(loaded, Mesh.create(mesh_layout(loaded.config), timeout_s=60))
        state = resumed.state()
        results.append((checkpoint.state_hash(state.tensors) if resumed.writes else "", state.meta, state.step))
    return results


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
