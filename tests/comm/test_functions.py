import pytest
import torch
from ranks import spawn

from tozan.comm import Mesh
from tozan.comm import functions as f
from tozan.layout import Layout, split

SIZE = 3
PAIRS = {
    # name: (call, reference of all ranks' inputs, whether the output is the same on all ranks and used only once)
    "copy_to": lambda x, a: f.copy_to(x, a),
    "reduce_from": lambda x, a: f.reduce_from(x, a),
    "gather_from": lambda x, a: f.gather_from(x, a, 1),
    "scatter_to": lambda x, a: f.scatter_to(x, a, 1),
    "all_gather_from": lambda x, a: f.all_gather_from(x, a, 1),
    "reduce_scatter_to": lambda x, a: f.reduce_scatter_to(x, a, 1),
    "broadcast_from": lambda x, a: f.broadcast_from(x, a, 1),
    "reduce_to": lambda x, a: f.reduce_to(x, a, 2),
    "all_to_all_over": lambda x, a: f.all_to_all_over(x, a, 1, 0),
}


def part(x, index):
    piece = split(x.shape[1], SIZE, index)
    return x[:, piece.start : piece.stop]


def outputs(name, xs):
    """Outputs of all ranks in one process."""
    total = sum(xs)
    if name == "copy_to":
        return xs
    if name == "reduce_from":
        return [total] * SIZE
    if name in ("gather_from", "all_gather_from"):
        return [torch.cat(xs, 1)] * SIZE
    if name == "scatter_to":
        return [part(x, i) for i, x in enumerate(xs)]
    if name == "reduce_scatter_to":
        return [part(total, i) for i in range(SIZE)]
    if name == "broadcast_from":
        return [xs[1]] * SIZE
    if name == "reduce_to":
        return [total if i == 2 else torch.zeros_like(total) for i in range(SIZE)]
    return [torch.cat([part(x, i) for x in xs], 0) for i in range(SIZE)]


# These state that their input or output is replicated, so their gradient is not the plain adjoint over ranks.
REPLICATED = {"copy_to", "reduce_from", "gather_from", "scatter_to"}


def run(name):
    axis = Mesh.create(Layout(tp=SIZE), timeout_s=20)["tp"]
    torch.manual_seed(1)
    xs = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(SIZE)]
    if name in ("copy_to", "scatter_to"):  # a replicated input
        xs = [xs[0].detach().clone().requires_grad_() for _ in range(SIZE)]
    expected = outputs(name, xs)
    weights = [torch.randn_like(y) for y in expected]
    if name in ("reduce_from", "gather_from"):  # a replicated output, used alike by everyone
        weights = [weights[0]] * SIZE
    x = xs[axis.index].detach().clone().requires_grad_()
    y = PAIRS[name](x, axis)
    torch.testing.assert_close(y, expected[axis.index])
    (y * weights[axis.index]).sum().backward()
    if name in ("reduce_from", "gather_from"):
        (expected[0] * weights[0]).sum().backward()
        gradient = xs[axis.index].grad
    else:
        sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
        gradient = xs[axis.index].grad
        if name in ("copy_to", "scatter_to"):
            gradient = sum(other.grad for other in xs)
    expected_gradient = torch.zeros_like(x) if gradient is None else gradient
    torch.testing.assert_close(x.grad, expected_gradient, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", PAIRS)
def test_forward_and_backward_equal_one_process_that_holds_all_ranks(name):
    spawn(SIZE, run, name)


def test_all_functions_are_covered():
    public = {name for name in dir(f) if callable(getattr(f, name)) and getattr(f, name).__module__ == f.__name__}
    assert {name for name in public if not name.startswith("_")} == set(PAIRS)
    assert set(PAIRS) >= REPLICATED
