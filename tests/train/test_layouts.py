"""The trainer under every kind of layout: the same losses, norms and checkpoints as one process."""

import gc
import json
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
from ranks import spawn
from torch.nn import Parameter

from tozan import checkpoint
from tozan.comm import Mesh
from tozan.config import load
from tozan.errors import UserError
from tozan.train import fit
from tozan.train.run import assemble, shape_of
from tozan.train.split import mesh_layout, require_fit

GPT2 = ["--model.family=gpt2", "--model.tied=true"]
LLAMA = ["--model.family=llama", "--model.tied=false", "--model.kv_heads=2"]
FAMILIES = {"gpt2": GPT2, "llama": LLAMA}
STEPS = 10
BOUNDS = {"fp64": 1e-10, "fp32": 1e-3}
"""Largest relative difference of a loss or a gradient norm in 10 steps, where sums run in another order."""

BITWISE = {
    "dp2": "data=2",
    "dp4": "data=4",
    "dp8": "data=8",
    "dp2-zero1": "data=2 zero=1",
    "dp2-zero2": "data=2 zero=2",
    "dp2-zero3": "data=2 zero=3",
    "dp4-zero1-by2": "data=4 zero=1 zero_group=2",
    "dp4-zero3": "data=4 zero=3",
    "dp4-zero3-by2": "data=4 zero=3 zero_group=2",
    "pp2": "pipeline=2",
    "pp2-interleaved": "pipeline=2 schedule=interleaved chunks=2",
    "pp2-zb": "pipeline=2 schedule=zero-bubble",
    "pp2-uneven": "pipeline=2 split=[1,3]",
    "pp2-interleaved-uneven": "pipeline=2 schedule=interleaved chunks=2 split=[1,1,1,1]",
    "pp4-gpipe": "pipeline=4 schedule=gpipe",
    "dp2-pp2": "data=2 pipeline=2",
    "dp2-pp2-zb": "data=2 pipeline=2 schedule=zero-bubble",
    "dp2-pp2-interleaved-zero1": "data=2 pipeline=2 schedule=interleaved chunks=2 zero=1",
    "dp2-pp2-zero2": "data=2 pipeline=2 zero=2",
    "dp4-pp2-zero1-by2": "data=4 pipeline=2 zero=1 zero_group=2",
    "dp2-pp4-zb-zero1": "data=2 pipeline=4 schedule=zero-bubble zero=1",
}
WITHIN = {
    "tp2": "tensor=2",
    "tp2-seq": "tensor=2 sequence_parallel=true",
    "tp4-2d": "tensor=4 scheme=2d",
    "tp8-2.5d": "tensor=8 scheme=2.5d depth=2",
    "cp2": "context=2",
    "cp4": "context=4",
    "dp2-cp2-zero1": "data=2 context=2 zero=1",
    "cp2-tp2-seq": "context=2 tensor=2 sequence_parallel=true",
    "dp2-cp2-zero3-by2": "data=2 context=2 zero=3 zero_group=2",
    "dp2-cp2-pp2": "data=2 context=2 pipeline=2 split=[1,3]",
    "dp2-tp2": "data=2 tensor=2",
    "dp2-tp2-seq-zero2": "data=2 tensor=2 sequence_parallel=true zero=2",
    "dp2-tp4-2d-zero1": "data=2 tensor=4 scheme=2d zero=1",
    "tp2-pp2": "tensor=2 pipeline=2",
    "dp2-tp2-pp2": "data=2 tensor=2 pipeline=2",
}
LAYOUTS = BITWISE | WITHIN
CASES = {
    (name, family): ("fp64", "fp32") if (number + turn) % 2 else ("fp64",)
    for number, name in enumerate(LAYOUTS)
    for turn, family in enumerate(FAMILIES)
}
"""Precisions by layout and family: fp64, the stricter one, always; fp32 with either family in turn."""

CONFIG = """
version = 1
[run]
folder = "{folder}"
[model]
layers = {layers}
width = 32
heads = 4
mlp_width = 64
vocabulary = 384
sequence = 16
[data]
path = "{data}"
[train]
steps = {steps}
global_batch = {batch}
precision = "{precision}"
threads = 1
[optim]
lr = 1e-2
warmup = 1
clip = 0.5
[eval]
every = 10
samples = 8
"""


def write(
    folder: Path, data: Path, steps: int = STEPS, precision: str = "fp32", layers: int = 4, batch: int = 16
) -> Path:
    path, values = folder.with_name(folder.name + ".toml"), {"steps": steps, "precision": precision, "batch": batch}
    path.write_text(CONFIG.format(folder=folder, data=data, layers=layers, **values))
    return path


def layers_of(name: str) -> int:
    """A pipeline needs something to share out; without one, more layers would only repeat the same messages."""
    return 4 if "pp" in name else 2


def batch_of(name: str) -> int:
    """Enough for two micro-batches a rank (one on a grid), or to fill a pipeline of four."""
    return 16 if any(many in name for many in ("dp4", "dp8", "pp4", "2d", "2.5d")) else 8


def flags_of(name: str, model: list[str]) -> list[str]:
    """Equal micro-batching (2 samples each) where bits are compared; else larger ones, for fewer messages."""
    flags = [f"--layout.{setting}" for setting in LAYOUTS.get(name, "").split()]
    flags += ['--train.recompute_stages=["full", "none"]'] if "uneven" in name else []
    samples = 4 if name in WITHIN else 2
    if "2d" in name or "2.5d" in name:
        samples = 8 if "dp2" in name else 16
    return [*model, *flags, f"--train.micro_batch={samples}"]


def processes(flags: list[str]) -> int:
    sizes = dict(flag.removeprefix("--layout.").split("=") for flag in flags if flag.startswith("--layout."))
    return prod(int(sizes.get(axis, 1)) for axis in ("data", "context", "tensor", "pipeline"))


def run_rank(paths: list[Path], flags: list[str]) -> None:
    """Run configs one after the other."""
    mesh = Mesh.create(mesh_layout(load(paths[0], flags).config), timeout_s=60)
    for path in paths:
        fit(assemble(load(path, flags), mesh))


def run(paths: list[Path], flags: list[str]) -> None:
    size = processes(flags)
    if size == 1:
        run_rank(paths, flags)
    else:
        spawn(size, run_rank, paths, flags, timeout=200.0)


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
def reference(text_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """`reference(family, precision, layers, batch)`: the folder of a run of one process."""
    base = tmp_path_factory.mktemp("one")

    @cache
    def train(family: str, precision: str, layers: int, batch: int) -> Path:
        folder = base / f"{family}-{precision}-{layers}-{batch}"
        run([write(folder, text_data, STEPS, precision, layers, batch)], flags_of("one", FAMILIES[family]))
        return folder

    return train


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_layout_trains_as_one_process_does(name, family, reference, text_data, tmp_path):
    """In fp64 to 1e-10, which leaves no room for another result; in fp32 to the bit where sums run in one order."""
    precisions, layers, batch = CASES[name, family], layers_of(name), batch_of(name)
    folders = {precision: tmp_path / precision for precision in precisions}
    run([write(folders[p], text_data, STEPS, p, layers, batch) for p in precisions], flags_of(name, FAMILIES[family]))
    for precision, folder in folders.items():
        alone = reference(family, precision, layers, batch)
        got, expected = curves(folder), curves(alone)
        assert got["tokens"] == expected["tokens"]
        for key in ("loss", "norm", "held out"):
            assert got[key] == pytest.approx(expected[key], rel=BOUNDS[precision]), (precision, key)
        ends = final(folder), final(alone)
        assert ends[0].meta["samples"] == ends[1].meta["samples"] == batch * STEPS
        if name in BITWISE:
            assert got == expected, precision
            assert checkpoint.state_hash(ends[0].tensors) == checkpoint.state_hash(ends[1].tensors), precision


def left_behind(path: Path, flags: list[str]) -> int:
    gc.collect()
    before = sum(isinstance(one, Parameter) for one in gc.get_objects())
    run_rank([path], flags)
    gc.collect()
    return sum(isinstance(one, Parameter) for one in gc.get_objects()) - before


@pytest.mark.parametrize("name", ["dp2", "dp2-zero3", "tp2", "cp2", "dp2-pp2"])
def test_a_run_that_is_over_leaves_no_weights_behind(name, text_data, tmp_path):
    """A process may train several times; nor may process groups stay, with their threads."""
    flags, path = flags_of(name, GPT2), write(tmp_path / "run", text_data, steps=2)
    assert set(spawn(processes(flags), left_behind, path, flags)) == {0}


MATRIX = [
    "one",
    "dp2",
    "dp4-zero1-by2",
    "dp2-zero3",
    "dp2-cp2-zero1",
    "tp2-seq",
    "tp4-2d",
    "tp8-2.5d",
    "pp2-interleaved",
    "dp2-tp2-pp2",
]
MATRIX += ["dp2-tp2-seq-zero2"]
"""Saved under each of these and loaded under each of these."""


@pytest.fixture(scope="module")
def saved(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The config of a run of one step per layout, with its checkpoint beside it."""
    base = tmp_path_factory.mktemp("saved")
    configs = {name: write(base / name, text_data, steps=1) for name in MATRIX}
    for name, path in configs.items():
        run([path], [*flags_of(name, GPT2), "--optim.warmup=0"])
    return configs


@pytest.mark.parametrize("name", MATRIX)
def test_a_checkpoint_of_any_layout_loads_into_any_other(name, saved, tmp_path):
    """Every rank takes its pieces; what they make together has the saved hash and the saved position in the data."""
    flags = [*flags_of(name, GPT2), "--optim.warmup=0"]
    size = processes(flags)
    if size == 1:
        ranks = [load_all(list(saved.values()), flags)]
    else:
        ranks = spawn(size, load_all, list(saved.values()), flags, timeout=200.0)
    for path, states in zip(saved.values(), zip(*ranks, strict=True), strict=True):
        folder = checkpoint.resolve(path.with_name(path.name.removesuffix(".toml")))
        before = checkpoint.load(folder)
        together = put_together([held for held, _, _ in states])
        assert together.keys() == before.tensors.keys()
        for tensor_name, tensor in together.items():
            assert torch.equal(tensor, before.tensors[tensor_name]), (path.stem, tensor_name)
        noted = json.loads((folder / "manifest.json").read_text())["state"]
        assert noted == checkpoint.state_hash(together) == checkpoint.state_hash(before.tensors), path.stem
        for _, meta, step in states:
            assert meta == before.meta
            assert step == before.step == 1


def load_all(configs: list[Path], flags: list[str]) -> list[tuple[dict, dict, int]]:
    """The boxes that this rank would save, meta and step, after loading each run's checkpoint."""
    results = []
    mesh = Mesh.create(mesh_layout(load(configs[0], flags).config), timeout_s=60)
    for path in configs:
        state = assemble(load(path, flags), mesh).state()
        held = {
            name: (pieces.shape, [(box.offset, box.tensor.detach().contiguous().numpy()) for box in pieces.boxes])
            for name, pieces in state.held().items()
        }
        results.append((held, state.meta, state.step))
    return results


def put_together(ranks: list[dict]) -> dict[str, torch.Tensor]:
    """Global tensors from every rank's boxes, after checking that each element is there once."""
    whole, seen = {}, {}
    for held in ranks:
        for name, (shape, boxes) in held.items():
            for offset, values in boxes:
                tensor = torch.from_numpy(values)
                target = whole.setdefault(name, torch.empty(shape, dtype=tensor.dtype))
                count = seen.setdefault(name, torch.zeros(shape, dtype=torch.int32))
                place = tuple(slice(at, at + size) for at, size in zip(offset, values.shape, strict=True))
                target[place] = tensor
                count[place] += 1
    assert all(count.eq(1).all() for count in seen.values())
    return whole


def check(path: Path, flags: list[str]) -> None:
    loaded = load(path, flags)
    require_fit(loaded.config, shape_of(loaded), "run.toml")


BAD = {
    "heads 4 ÷ tp 3": ["--layout.tensor=3"],
    "6 pieces of a model of 4 layers": ["--layout.pipeline=6"],
    "layout.tensor 6 is not q × q": ["--layout.tensor=6", "--layout.scheme=2d"],
    "zero 3 with pipeline 2": ["--layout.data=2", "--layout.pipeline=2", "--layout.zero=3"],
    "layout.split 1 + 2 = 3 layers": ["--layout.pipeline=2", "--layout.split=[1,2]"],
    "has 3 numbers for pipeline 2 = 2 pieces": ["--layout.pipeline=2", "--layout.split=[1,1,2]"],
    "layout.split [4] with pipeline 1": ["--layout.split=[4]"],
    "has 1 words for 2 pipeline stages": ["--layout.pipeline=2", '--train.recompute_stages=["full"]'],
    "sequence 16 ÷ (2 × cp 3) leaves 4 tokens over": ["--layout.context=3"],
    "cp 2 with scheme 2d": ["--layout.context=2", "--layout.tensor=4", "--layout.scheme=2d", "--train.micro_batch=2"],
    "dropout 0.1 with cp 2": ["--layout.context=2", "--model.dropout=0.1"],
    "layout.data 2 × context 2 ÷ zero_group 3": [
        *("--layout.data=2", "--layout.context=2", "--layout.zero=1", "--layout.zero_group=3")
    ],
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
