"""Linear layers whose weight gradient waits: the bits of one that does not, and nothing in `.grad` before its time."""

import pytest
import torch
from torch import nn

from tozan.comm import Axis
from tozan.models.layers import Linear
from tozan.parallel.summa import Grid
from tozan.parallel.tensor_2d import SummaLinear
from tozan.parallel.weight_gradients import WeightGradients


def twins(bias):
    torch.manual_seed(1)
    one = Linear(24, 40, bias=bias)
    other = Linear(24, 40, bias=bias)
    other.load_state_dict(one.state_dict())
    return one, other


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("tokens", [7, 10])  # too few for a product of tozan's own, and enough
def test_bits_of_linear_whether_it_waits_or_not(bias, autocast, tokens):
    plain, waiting = twins(bias)
    gradients = WeightGradients()
    gradients.bind(nn.ModuleList([waiting]))
    for step, waits in enumerate((True, False, True)):
        x = torch.randn(3, tokens, 24)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = [layer(each * 1.0) for layer, each in zip((plain, waiting), inputs, strict=True)]
        assert torch.equal(*outputs)
        assert outputs[0].dtype == outputs[1].dtype
        dy = torch.randn_like(outputs[0])
        outputs[0].backward(dy)
        before = None if waiting.weight.grad is None else waiting.weight.grad.clone()
        if waits:
            gradients.begin(step)
        outputs[1].backward(dy)
        gradients.end()
        if waits:
            now = waiting.weight.grad
            assert (now is None) if before is None else torch.equal(now, before)
            gradients.finish(step)
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        for mine, reference in zip(waiting.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, reference.grad)


def test_hooks_hear_of_gradients_that_waited():
    _, layer = twins(True)
    gradients = WeightGradients()
    gradients.bind(nn.ModuleList([layer]))
    heard = []

    def hear(parameter):
        if parameter.grad is not None:  # autograd calls hooks for a gradient that is not there, too
            heard.append(parameter.grad.clone())

    layer.weight.register_post_accumulate_grad_hook(hear)
    gradients.begin("first")
    layer(torch.ones(2, 24)).sum().backward()
    assert heard == []
    gradients.end()
    gradients.finish("first")
    assert torch.equal(heard[0], torch.full((40, 24), 2.0))


def test_blocks_wait_too():
    plain, _ = twins(True)
    grid = Grid(Axis.single("tp_row"), Axis.single("tp_col"))
    layer = SummaLinear({name: nn.Parameter(p.detach().clone()) for name, p in plain.named_parameters()}, grid)
    gradients = WeightGradients()
    gradients.bind(nn.ModuleList([layer]))
    x = torch.randn(2, 5, 24)
    plain(x).square().sum().backward()
    gradients.begin(0)
    layer(x).square().sum().backward()
    assert layer.weight.grad is None
    gradients.finish(0)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_frozen_weights_stay_without_gradient():
    _, layer = twins(False)
    layer.weight.requires_grad_(False)
    gradients = WeightGradients()
    gradients.bind(nn.ModuleList([layer]))
    x = torch.randn(2, 24, requires_grad=True)
    gradients.begin(0)
    layer(x).sum().backward()
    gradients.finish(0)
    assert layer.weight.grad is None
    assert x.grad is not None
