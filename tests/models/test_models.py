"""The models against transformers, and against themselves in other circumstances."""

import copy
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tozan.checkpoint import huggingface
from tozan.models import Shape, create
from tozan.models.arithmetic import block_matrices, block_parameters, forward_flops, model_flops, parameters
from tozan.models.layers import Cache, initial
from tozan.ops import native


def our_gradients(shape, twin):
    """The twin's gradients under our names, through its own weights' round trip."""
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    entries = huggingface._entries(shape)
    parts = {e.name: [gradients[name] for name, _ in e.parts] for e in entries}
    transposed = {e.name for e in huggingface._entries(shape) if e.transposed}
    return {name: torch.cat(part).T if name in transposed else torch.cat(part) for name, part in parts.items()}


def test_logits_loss_and_every_gradient_equal_transformers(shape, tokens, random_model, transformers_twin):
    model = random_model(shape)
    twin = transformers_twin(model)
    x, y = tokens(shape), tokens(shape, seed=1)
    y[0, :5] = -100
    logits = twin(x).logits
    torch.testing.assert_close(model(x), logits, rtol=1e-5, atol=2e-5)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").backward()
    loss = model(x, y)
    loss.backward()
    expected = our_gradients(shape, twin)
    assert expected.keys() == dict(model.named_parameters()).keys()
    for parameter_name, parameter in model.named_parameters():
        scale = expected[parameter_name].abs().max()
        assert (parameter.grad - expected[parameter_name]).abs().max() <= 2e-5 * scale, parameter_name


def test_parameters_are_counted_and_named_as_promised(shape):
    model = create(shape, seed=0)
    assert sum(p.numel() for p in model.parameters()) == parameters(shape)
    assert sum(p.numel() for p in model.blocks[0].parameters()) == block_parameters(shape)
    sizes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for matrix, size in block_matrices(shape).items():
        assert sizes[f"blocks.1.{matrix}.weight"] == size
    assert ("head.weight" in sizes) != shape.tied


def test_flops_equal_what_runs(shape, tokens, monkeypatch):
    monkeypatch.setattr(native, "_chosen", "plain")  # the counter sees PyTorch's products only
    model = create(shape, seed=0)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = model(tokens(shape, samples=1))
    assert counter.get_total_flops() == forward_flops(shape)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens(shape, samples=1)).sum().backward()
    assert logits.shape == (1, shape.sequence, shape.vocabulary)
    assert counter.get_total_flops() == model_flops(shape)


def test_every_module_with_parameters_has_one_role(shape):
    from fnmatch import fnmatchcase

    model = create(shape, seed=0)
    roles = {"vocab", "position", "norm", "qkv", "col", "row"}
    assert set(model.roles.values()) <= roles
    for path, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            assert [pattern for pattern in model.roles if fnmatchcase(path, pattern)], path


def test_initial_weights_depend_on_seed_name_and_size_only(shapes):
    shape = shapes["gpt2"]
    model, deeper = create(shape, 7), create(dataclasses.replace(shape, vocabulary=200), 7)
    torch.manual_seed(123)
    torch.randn(5)
    again, other = create(shape, 7), create(shape, 8)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, initial(shape, name, parameter.shape, 7)), name
        assert torch.equal(parameter, again.get_parameter(name))
        if name != "embed.weight":
            assert torch.equal(parameter, deeper.get_parameter(name)), "another parameter's size changed this one"
        if parameter.ndim == 2:
            assert not torch.equal(parameter, other.get_parameter(name))
    matrices = [parameter.flatten()[:100] for parameter in model.parameters() if parameter.ndim == 2]
    assert len({tuple(matrix.tolist()) for matrix in matrices}) == len(matrices)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_initial_deviations_are_gpt2s(family):
    shape = Shape(family, 8, 128, 4, 4, 512, 2000, 32, tied=False)
    for name, parameter in create(shape, 0).named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm" in name and "weight" in name)))
            continue
        residual = name.endswith(("attn.proj.weight", "mlp.proj.weight", "mlp.down.weight"))
        expected = 0.02 / 4 if residual else 0.02  # √(2·8) = 4
        assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_fp32_and_keeps_fp32_gradients(shape, dtype, tokens, random_model):
    model, exact = random_model(shape), random_model(shape)
    x, y = tokens(shape), tokens(shape, seed=1)
    with torch.autocast("cpu", dtype):
        loss = model(x, y)
    assert loss.dtype == torch.float32
    loss.backward()
    expected = exact(x, y)
    expected.backward()
    bound = 0.15 if dtype == torch.bfloat16 else 0.02
    assert abs(loss - expected) <= bound / 10 * expected
    for parameter_name, parameter in model.named_parameters():
        reference = exact.get_parameter(parameter_name).grad
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - reference).norm() <= bound * reference.norm() + 1e-6, parameter_name


def test_cache_gives_the_same_logits_in_any_portions(shape, tokens, random_model):
    model = random_model(shape)
    x = tokens(shape)
    with torch.no_grad():
        whole = model(x)
        cache = Cache(shape.layers, shape.sequence)
        parts = [model(part, cache=cache) for part in x.split([7, 1, 1, 5, 10], dim=1)]
    assert cache.length == shape.sequence
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="cache holds 24"):
        cache.blocks[0].extend(torch.zeros(2, 1, 1, 8), torch.zeros(2, 1, 1, 8))


def test_attention_on_half_the_heads_is_half_the_sum(shapes, random_model):
    """The contract with tensor parallelism: replace `qkv` and `proj` by shards, and partial outputs add up."""
    shape = shapes["llama-grouped"]
    block = random_model(shape).blocks[0]
    x = torch.randn(2, 24, shape.width, generator=torch.Generator().manual_seed(0))
    total = torch.zeros_like(x)
    for rank in range(2):
        shard = copy.deepcopy(block.attn)
        q, k, v = block.attn.qkv.weight.split([shape.width, shape.kv_width, shape.kv_width])
        rows = [part.chunk(2)[rank] for part in (q, k, v)]
        shard.qkv.weight = torch.nn.Parameter(torch.cat(rows))
        shard.proj.weight = torch.nn.Parameter(block.attn.proj.weight.chunk(2, dim=1)[rank])
        total += shard(shard.qkv(x))
    torch.testing.assert_close(total, block.attn(block.attn.qkv(x)), rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_only(shapes, tokens):
    shape = dataclasses.replace(shapes["gpt2"], dropout=0.5)
    model, plain = create(shape, 0), create(shapes["gpt2"], 0)
    x = tokens(shape)
    assert not torch.equal(model(x), plain(x))
    assert torch.equal(model.eval()(x), plain(x))


def test_published_sizes():
    """124M and 7B, as their papers count them."""
    assert parameters(Shape("gpt2", 12, 768, 12, 12, 3072, 50257, 1024)) == 124_439_808
    assert parameters(Shape("llama", 32, 4096, 32, 32, 11008, 32000, 2048, tied=False)) == 6_738_415_616
