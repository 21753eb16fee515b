"""Recomputation: the same bits, fewer bytes, and no matrix product twice unless `full`."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tozan.models import Shape, create
from tozan.models.arithmetic import block_matrices, forward_flops, hardware_flops
from tozan.ops import native
from tozan.parallel import recompute

SHAPES = {
    "gpt2": Shape("gpt2", 2, 64, 4, 4, 256, 160, 32),
    "gpt2-dropout": Shape("gpt2", 2, 64, 4, 4, 256, 160, 32, dropout=0.2),
    "llama": Shape("llama", 2, 64, 4, 4, 192, 160, 32),
    "llama-grouped": Shape("llama", 2, 64, 4, 2, 192, 160, 32, tied=False),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def batch(shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, shape.vocabulary, (2, 2, shape.sequence), generator=generator)


def step(model, dtype):
    """Loss and gradients of one step, with the same dropout each time."""
    torch.manual_seed(3)
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(*batch(model.shape))
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_are_the_same_bits(name, dtype):
    model = create(SHAPES[name], seed=0)
    expected = step(model, dtype)
    for mode in ("selective", "full", "none"):
        recompute.apply(model, mode)
        found = step(model, dtype)
        assert all(torch.equal(found[key], expected[key]) for key in expected), mode


def kept_bytes(model, mode):
    """Bytes that one block keeps for backward in bf16 autocast, parameters and their bf16 copies aside."""
    recompute.apply(model, mode)
    shape = model.shape
    x = torch.randn(3, shape.sequence, shape.width).requires_grad_() * 1.0
    weights = set(block_matrices(shape).values()) | {size[::-1] for size in block_matrices(shape).values()}
    kept, alive = {}, []

    def pack(tensor):
        alive.append(tensor)  # so that no address is used twice
        if tuple(tensor.shape) not in weights and not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.blocks[0](x)
    tables = [buffer.untyped_storage().data_ptr() for buffer in model.buffers()]
    return sum(size for address, size in kept.items() if address not in tables) / (3 * shape.sequence)


def test_kept_bytes_are_as_documented():
    """Per token: multiples of D, plus 4 bytes per head (flash attention's sums) and per norm statistic."""
    model = create(SHAPES["gpt2"], seed=0)
    d, f, heads = 64, 256, 4
    # fp32: the input of each norm; bf16: q, k, v, attention's output; fc's output.
    selective = 2 * 4 * d + 2 * (3 * d + d) + 2 * f + 4 * heads
    assert kept_bytes(model, "none") == selective + 2 * (2 * d + f) + 4 * 4
    assert kept_bytes(model, "selective") == selective
    assert kept_bytes(model, "full") == 4 * d


def test_llama_keeps_less_too():
    model = create(SHAPES["llama"], seed=0)
    none, selective, full = (kept_bytes(model, mode) for mode in ("none", "selective", "full"))
    d, f = 64, 192
    # Gone: norm1's output and statistic, and the product in bf16; silu's output too, where no kernel makes both.
    assert none - selective >= 2 * d + 2 * f * (1 if native.status() == native.COMPILED else 2)
    assert full == 4 * d


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_matrix_products_are_repeated_by_full_only(name, mode, monkeypatch):
    ours, product = [], native.product
    monkeypatch.setattr(
        native, "product", lambda *t, **k: ours.append(2 * t[1].numel() * t[2].shape[1]) or product(*t, **k)
    )
    shape = SHAPES[name]
    model = create(shape, seed=0)
    recompute.apply(model, mode)
    x, _ = batch(shape)
    # The plain attention counts 2 + 4 products as the formula does; the fused one makes a fifth in backward.
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(x[:1]).sum().backward()
    found = counter.get_total_flops() + sum(ours)
    if mode != "full":
        assert found == hardware_flops(shape, mode)
        return
    # Early stopping spares the last product of each block, whose output no gradient needs.
    last = 2 * shape.sequence * shape.width * shape.mlp_width * shape.layers
    assert hardware_flops(shape, mode) - last == found > 3 * forward_flops(shape)


def test_copies_and_repeated_calls():
    model = create(SHAPES["gpt2"], seed=0)
    recompute.apply(model, "full")
    recompute.apply(model, "selective")
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(model.blocks[0].mlp.proj.weight)
    plain = create(SHAPES["gpt2"], seed=0)
    expected = step(plain, None)
    found = step(twin, None)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    recompute.apply(twin, "none")
    assert all("forward" not in block.__dict__ and "forward" not in block.mlp.__dict__ for block in twin.blocks)
    assert twin.state_dict().keys() == plain.state_dict().keys()


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="sometimes"):
        recompute.apply(create(SHAPES["gpt2"], seed=0), "sometimes")
