import math

import pytest
import torch
from torch import nn

from tozan.layout import SEGMENT
from tozan.optim.gradients import (
    clip_factor,
    gradient_norm,
    norm_of_sums,
    segment_squares,
    sums_of_squares,
)


def with_gradients(*gradients):
    parameters = {}
    for index, gradient in enumerate(gradients):
        parameters[f"p{index}"] = nn.Parameter(torch.zeros_like(gradient))
        parameters[f"p{index}"].grad = gradient.clone()
    return parameters


def test_norm_and_clipping_agree_with_torch():
    torch.manual_seed(0)
    gradients = [torch.randn(40, 30), torch.randn(7), torch.randn(2, 3, 4)]
    ours, theirs = with_gradients(*gradients), with_gradients(*gradients)
    expected = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.5)
    norm = gradient_norm(ours)
    assert norm.value == pytest.approx(float(expected), rel=1e-6)
    factor = clip_factor(norm.value, 1.5)
    for name in ours:
        torch.testing.assert_close(ours[name].grad * factor, theirs[name].grad, rtol=1e-5, atol=1e-7)


def test_norm_is_of_the_unscaled_gradient():
    parameters = with_gradients(torch.full((4,), 8.0))
    assert gradient_norm(parameters, scale=8.0).value == 2.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_names_the_parameter_that_is_not_finite(bad):
    parameters = with_gradients(torch.ones(3), torch.tensor([1.0, bad]))
    assert "p1" in gradient_norm(parameters).culprit


def test_no_clipping_below_the_limit_or_without_one():
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(100.0, 0.0) == 1.0
    assert clip_factor(4.0, 1.0) == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_has_the_same_bits_wherever_a_parameter_is_cut_at_segments(dtype):
    torch.manual_seed(3)
    gradient = torch.randn(10 * SEGMENT + 17, dtype=dtype)
    whole = segment_squares(gradient)
    for cut in (SEGMENT, 7 * SEGMENT, 10 * SEGMENT):
        assert torch.equal(torch.cat((segment_squares(gradient[:cut]), segment_squares(gradient[cut:]))), whole)
    assert norm_of_sums(sums_of_squares({"a": whole})).value == pytest.approx(float(gradient.double().norm()), rel=1e-7)
