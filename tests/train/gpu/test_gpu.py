"""Training on a GPU: the numbers of the CPU, the same bits when repeated, and errors found in the GPU's memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tozan import checkpoint
from tozan.layout import SEGMENT
from tozan.ops import checksum_reference, cross_entropy, linear_cross_entropy, many, native
from tozan.optim.gradients import segment_squares
from tozan.train import assemble, evaluate, train
from tozan.train.checks import SilentError
from tozan.train.clock import Clock
from tozan.train.step import train_step

GPU = "--train.device=cuda"


def records(folder, kind="step"):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(configure, *flags, folder="run"):
    train(loaded := configure(*flags, folder=folder))
    return [record["loss"] for record in records(Path(loaded.config.run.folder))]


@pytest.mark.parametrize("choice", ["auto", "plain"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_the_chunked_loss_and_its_gradients_equal_torch_in_fp64(monkeypatch, choice, dtype, bound):
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", {"cuda": 64 * 1000})
    native.choose(choice)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator).to("cuda", dtype).requires_grad_()
    weight = torch.randn(1000, 64, generator=generator).mul(0.3).to("cuda", dtype).requires_grad_()
    targets = torch.randint(0, 1000, (200,), generator=generator).cuda()
    targets[::7] = -100
    loss = linear_cross_entropy(x, weight, targets)
    found = torch.autograd.grad(loss, (x, weight))
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=bound)
    for gradient, reference in zip(found, torch.autograd.grad(expected, wide), strict=True):
        assert gradient.dtype == dtype
        assert float((gradient.double() - reference).norm() / reference.norm()) <= bound


def test_a_target_that_is_no_token_makes_the_loss_nan():
    logits = torch.randn(3, 100, device="cuda", requires_grad=True)
    loss = linear_cross_entropy(logits, torch.eye(100, device="cuda"), torch.tensor([1, 100, 2], device="cuda"))
    assert loss.isnan()


def test_sums_over_many_tensors_are_those_of_each():
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(1,), (2,), (5,), (256,), (257,), (4096,), (100_001,), (77, 33), (3_000_000,)]
    tensors = [torch.randn(size, device="cuda", generator=generator) for size in sizes]
    assert many.usable(tensors)
    assert many.checksums(tensors).tolist() == [int(checksum_reference(t.cpu())) for t in tensors]
    squares = many.segment_squares(tensors, SEGMENT)
    for found, tensor in zip(squares, tensors, strict=True):
        expected = segment_squares(tensor.cpu())
        assert torch.allclose(found.cpu(), expected, rtol=1e-5)
    assert torch.allclose(many.sums(squares), torch.stack([square.sum() for square in squares]), rtol=1e-12)
    assert torch.equal(many.sums(squares), many.sums(squares))


@pytest.mark.parametrize(
    "flags",
    [
        ("--train.compile=false",),
        ("--train.compile=true",),
        ("--train.compile=false", "--train.recompute=selective"),
        ("--train.compile=true", "--train.recompute=full"),
        ("--train.compile=false", "--train.kernels=plain", "--model.dropout=0"),
        ("--train.compile=true", "--model.family=llama", "--model.kv_heads=1"),
        ("--train.compile=false", "--train.deterministic=false", "--model.family=llama"),
    ],
    ids=lambda flags: " ".join(flag.partition(".")[2] for flag in flags),
)
def test_losses_are_those_of_the_cpu(configure, flags):
    on_cpu = losses(configure, *flags, "--train.compile=false", "--train.device=cpu", folder="cpu")
    assert losses(configure, *flags, GPU) == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32(configure, precision):
    steps = "--train.steps=12"
    exact = losses(configure, steps, GPU, "--train.compile=false", folder="fp32")
    found = losses(configure, steps, GPU, "--train.compile=false", f"--train.precision={precision}")
    assert found == pytest.approx(exact, rel=0.02)
    assert found[-1] < found[0] - 0.5


@pytest.mark.parametrize("compiled", ["true", "false"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(configure, tmp_path, compiled):
    flags = (
        GPU,
        "--checkpoint.every=3",
        "--train.precision=bf16",
        "--model.dropout=0.1",
        f"--train.compile={compiled}",
    )
    train(configure(*flags, folder="whole"))
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    first = next(iter(sorted((tmp_path / "whole" / "checkpoints").iterdir())))
    shutil.copytree(first, tmp_path / "again" / "checkpoints" / first.name)
    train(configure(*flags, folder="again"))
    hashes = [
        checkpoint.state_hash(checkpoint.load(checkpoint.resolve(tmp_path / name)).tensors)
        for name in ("whole", "again")
    ]
    assert records(tmp_path / "again")[0]["step"] == 4
    assert hashes[0] == hashes[1]


def test_a_checkpoint_of_a_gpu_continues_on_the_cpu(configure, tmp_path):
    train(configure(GPU, "--checkpoint.every=3", folder="run"))
    on_gpu = [record["loss"] for record in records(tmp_path / "run")]
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    shutil.rmtree(newest)
    train(configure("--train.device=cpu", folder="run"))
    assert [record["loss"] for record in records(tmp_path / "run")][-3:] == pytest.approx(on_gpu[-3:], rel=1e-4)
    [*_, scored] = records(tmp_path / "run", "eval")
    assert evaluate(tmp_path / "run", samples=4)["loss"] == pytest.approx(scored["loss"], rel=1e-4)


@pytest.mark.parametrize("place", ["weight", "moment"])
def test_a_flipped_bit_in_the_gpus_memory_is_found_before_the_next_update(configure, place):
    run = assemble(configure(GPU, "--checks.memory=all"))
    for _ in range(3):
        assert train_step(run, Clock(run.device)).again is None
        run.step, run.samples = run.step + 1, run.samples + run.global_batch
    name = "blocks.1.mlp.fc.weight"
    hit = run.split.sync.parameters[name].detach() if place == "weight" else run.optimizer.tensors()[f"exp_avg/{name}"]
    hit.view(-1).view(torch.int32)[77] ^= 1 << 9
    with pytest.raises(SilentError, match=name):
        train_step(run, Clock(run.device))


def test_phases_are_the_gpus_and_sum_to_the_step(configure, tmp_path):
    train(configure(GPU, "--train.compile=false"))
    for record in records(tmp_path / "run"):
        assert sum(record["phases"].values()) == pytest.approx(record["seconds"], rel=1e-6)
        assert record["gpu_memory_bytes"] > 0
    assert all(record["phases"][phase] > 0 for phase in ("forward", "backward", "optimizer"))
    timeline = json.loads(next((tmp_path / "run" / "timeline").iterdir()).read_text())
    assert all(start <= end for _, start, end in timeline["phases"])


def test_the_commands_work_on_a_gpu(configure, tmp_path):
    """Each in a process of its own: training under an agent that keeps copies, evaluating, writing, measuring."""
    configure(folder="run")
    run, config = str(tmp_path / "run"), str(tmp_path / "run.toml")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # for torchrun
    for words in (
        ["launch", config, "--launcher=torchrun", "--agent", GPU, "--train.compile=false", "--checkpoint.every=2"],
        ["eval", run],
        ["generate", run, "--prompt", "def ", "--tokens", "5"],
        ["bench", "step", "gpt2-tiny", GPU],
    ):
        command = [sys.executable, "-m", "tozan", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path)
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-3000:])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["device"].startswith("cuda")
