import math

import pytest
import torch

from tozan.train import assemble
from tozan.train.metrics import Clock
from tozan.train.precision import Precision
from tozan.train.step import train_step

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
