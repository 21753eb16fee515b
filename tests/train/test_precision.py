import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from tozan import checkpoint, models
from tozan.train import assemble, evaluate, fit
from tozan.train.clock import Clock
from tozan.train.precision import Precision
from tozan.train.step import own_micro_batches, train_step

CPU = torch.device("cpu")


def test_scale_halves_on_overflow_and_grows_after_enough_good_steps():
    precision = Precision("fp16", CPU)
    start = precision.scale
    precision.update(overflow=True)
    assert precision.scale == start / 2
    for _ in range(Precision.growth_interval):
        precision.update(overflow=False)
    assert precision.scale == start
    for _ in range(100):
        precision.update(overflow=True)
    assert precision.scale == 1.0
    assert not precision.can_shrink()


def test_scale_survives_a_checkpoint_but_not_a_change_of_precision():
    precision = Precision("fp16", CPU)
    precision.update(overflow=True)
    again, other = Precision("fp16", CPU), Precision("bf16", CPU)
    again.load(precision.state())
    other.load(precision.state())
    assert again.scale == precision.scale
    assert other.scale == 1.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32(configure, precision):
    losses = {}
    for name in ("fp32", precision):
        run = assemble(configure(f"--train.precision={name}", "--train.steps=12", folder=name))
        losses[name] = []
        for _ in range(12):
            losses[name].append(train_step(run, Clock()).loss)
            run.step += 1
            run.samples += run.global_batch
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses[precision][-1] < losses[precision][0] - 0.5


def test_an_fp16_overflow_shrinks_the_scale_and_is_no_bad_step(configure):
    run = assemble(configure("--train.precision=fp16"))
    run.precision.scale = 2.0**40  # fp16 ends at 65,504
    weights = {name: p.detach().clone() for name, p in run.split.sync.parameters.items()}
    result = train_step(run, Clock())
    assert result.overflow
    assert result.skipped
    assert math.isfinite(result.loss)
    assert run.precision.scale == 2.0**39
    assert all(torch.equal(p, weights[name]) for name, p in run.split.sync.parameters.items())


def test_fp64_is_fp64_throughout(configure):
    """Gradients agree with PyTorch's own of an fp64 model to fp64's rounding, and a checkpoint keeps every bit."""
    run = assemble(configure("--train.precision=fp64", "--train.steps=3", "--optim.clip=0"))
    model = models.create(run.shape, run.config.train.seed).double()
    batches, tokens = own_micro_batches(run, run.samples)
    loss = sum(cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in batches) / tokens
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    result = train_step(run, Clock())
    assert result.loss == pytest.approx(loss.item(), rel=1e-13)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-13)
    ended = fit(run)
    saved = checkpoint.load(checkpoint.resolve(run.folder))
    kept = {**run.split.sync.parameters, **run.optimizer.tensors()}
    for name, tensor in saved.tensors.items():
        if not name.startswith("rng/"):
            assert tensor.dtype == torch.float64
            assert torch.equal(tensor, kept[name.partition("/")[2]])
    held_out = evaluate(run.folder, samples=4, precision="fp64")["loss"]
    assert held_out == pytest.approx(ended.held_out["loss"], rel=1e-13)
