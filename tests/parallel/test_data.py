import pytest
import torch
from ranks import spawn
from torch import nn
from training import alone, shape, together

from tozan.comm import Axis, Mesh
from tozan.layout import Layout
from tozan.parallel.data import DataParallel


def same_bits(a_shape, size, micro_batches, options):
    options = dict(options)
    expected = alone(a_shape, micro_batches=micro_batches)
    result = together(a_shape, size, 0, micro_batches=micro_batches, options=options)
    assert result[:2] == expected[:2]
    for mine, other in zip(result[2:4], expected[2:4], strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("family", "tied", "size", "micro_batches", "bucket_bytes"),
    [
        ("gpt2", True, 2, 2, 1 << 25),
        ("gpt2", False, 2, 6, 20_000),
        ("llama", True, 3, 6, 50_000),
        ("llama", False, 4, 4, 1),
    ],
)
def test_losses_norms_weights_and_state_have_the_single_process_bits(family, tied, size, micro_batches, bucket_bytes):
    spawn(size, same_bits, shape(family, tied), size, micro_batches, {"bucket_bytes": bucket_bytes})


def close_in_fp64(size):
    a_shape = shape()
    expected = alone(a_shape, dtype=torch.float64)
    for deterministic in (True, False):
        result = together(a_shape, size, 0, deterministic=deterministic, options={"dtype": torch.float64})
        torch.testing.assert_close(result[0], expected[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(result[1], expected[1], rtol=1e-12, atol=0)


def test_fp64_agrees_with_the_single_process_in_either_order():
    spawn(4, close_in_fp64, 4)


def counted(deterministic):
    return together(shape(), 2, 0, deterministic=deterministic, steps=1, options={"bucket_bytes": 1 << 25})[4]


@pytest.mark.parametrize(("deterministic", "reductions"), [(True, 2), (False, 1)])
def test_bytes_are_those_of_the_formula_and_nothing_is_sent_between_micro_batches(deterministic, reductions):
    parameters = sum(p.numel() for p in _parameters().values())
    for sent in spawn(2, counted, deterministic):
        gradients = {k: v for k, v in sent.items() if k[2].startswith("gradients")}
        scattered = sum(v for k, v in gradients.items() if k[1] == "reduce_scatter")
        gathered = sum(v for k, v in gradients.items() if k[1] == "all_gather")
        # 4 bytes, half of the buffer; the flat buffer's padding is below 255 elements per parameter
        assert parameters * 2 <= gathered <= parameters * 2 * 1.1
        assert scattered == reductions * gathered


def _parameters():
    from tozan import models

    return dict(models.create(shape(), 0).named_parameters())


class Partial(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.sometimes = nn.Linear(5, 3), nn.Linear(2, 2), nn.Linear(5, 3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x, both):
        y = self.used(x) * self.frozen
        return (y + self.sometimes(x) if both else y).sum()


def unused():
    mesh = Mesh.create(Layout(dp=2), timeout_s=20)
    torch.manual_seed(0)
    model, x = Partial(), torch.randn(2, 4, 5)
    sync = DataParallel(dict(model.named_parameters()), mesh["dp"], bucket_bytes=1)
    for _ in range(2):
        sync.begin(last=True)
        model(x[mesh.rank], both=mesh.rank == 0).backward()
        sync.finish()
        reference = Partial()
        reference.load_state_dict(model.state_dict())
        (reference(x[0], True) + reference(x[1], False)).backward()
        for name, parameter in model.named_parameters():
            expected = reference.get_parameter(name).grad
            if name.startswith("unused"):
                expected = torch.zeros_like(parameter)
            if expected is None:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, expected)
            parameter.grad = None
    with pytest.raises(RuntimeError, match="begin"):
        sync.finish()


def test_parameters_without_a_part_in_the_loss_and_frozen_ones():
    spawn(2, unused)


def against_ddp():
    from torch.nn.parallel import DistributedDataParallel

    mesh = Mesh.create(Layout(dp=2), timeout_s=20)
    torch.manual_seed(mesh.rank)
    model = nn.Sequential(nn.Linear(7, 30), nn.Tanh(), nn.Linear(30, 2)).double()
    sync = DataParallel(dict(model.named_parameters()), mesh["dp"], broadcast=True)
    twin = nn.Sequential(nn.Linear(7, 30), nn.Tanh(), nn.Linear(30, 2)).double()
    twin.load_state_dict(model.state_dict())
    ddp = DistributedDataParallel(twin)
    x = torch.randn(5, 7, dtype=torch.float64)
    sync.begin(last=True)
    model(x).square().sum().backward()
    sync.finish()
    ddp(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, 2 * theirs.grad, rtol=1e-13, atol=1e-13)


def test_agrees_with_torch_ddp_but_for_its_average():
    spawn(2, against_ddp)


def test_one_rank_needs_no_process_group():
    model = nn.Linear(3, 2)
    sync = DataParallel(dict(model.named_parameters()), Axis.single("dp"))
    sync.begin(last=True)
    model(torch.ones(1, 3)).sum().backward()
    sync.finish()
    assert sync.sums_of_squares() == pytest.approx({"weight": 6.0, "bias": 2.0})
