"""The list of matrix products: held to the model's FLOP count, to PyTorch's counter over transformers' models, and to
what the profiler sees in the trainer's own step."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tozan.bench.gemm import FUGAKU, FUGAKU_SPLITS, call, step_products
from tozan.errors import UserError
from tozan.models import create
from tozan.models.arithmetic import Shape, model_flops
from tozan.models.products import Product, other_flops, products
from tozan.ops import fused, native
from tozan.planner.sizes import find_shape

GPT2 = Shape("gpt2", 2, 64, 4, 4, 256, 320, 128)
LLAMA = Shape("llama", 2, 64, 4, 2, 192, 320, 128, tied=False)
ATTENTION = {"attn.scores", "attn.values"}


@given(
    st.sampled_from([GPT2, LLAMA]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([1, 2]),
    st.one_of(st.none(), st.integers(1, 900)),
)
def test_their_sum_is_the_models_flops(shape, micro_batch, micro_batches, tensor, head_tokens):
    found = products(shape, micro_batch, micro_batches, tensor, head_tokens=head_tokens)
    assert tensor * sum(one.step_flops for one in found) == micro_batch * micro_batches * model_flops(shape)
    by_direction = Counter()
    for one in found:
        by_direction[one.direction] += one.step_flops
    assert len(set(by_direction.values())) == 1, "a third each"
    assert len({(one.name, one.direction, one.label) for one in found}) == len(found)


@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=lambda shape: shape.family)
def test_pytorch_counts_the_same_in_transformers_models(shape):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": shape.vocabulary, "attn_implementation": "eager", "use_cache": False}
    if shape.family == "gpt2":
        config = transformers.GPT2Config(n_positions=128, n_embd=64, n_layer=2, n_head=4, **sizes)
        model = transformers.GPT2LMHeadModel(config)
    else:
        grouped = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=192, num_hidden_layers=2, **grouped, **sizes
        )
        model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, shape.vocabulary, (3, shape.sequence))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    counted = counter.get_flop_counts()["Global"]
    batched = {op: flops for op, flops in counted.items() if "bmm" in str(op)}
    found = products(shape, 3)
    attention = sum(one.step_flops for one in found if one.name in ATTENTION)
    assert sum(batched.values()) == attention
    assert sum(counted.values()) == sum(one.step_flops for one in found)


@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=lambda shape: shape.family)
def test_the_trainer_makes_these_products(shape, monkeypatch):
    """Every product of a bf16 step, by its sizes, PyTorch's as the profiler records them; scores are made twice.

    Attention goes through blocks here: what happens inside its kernel cannot be seen.
    """
    monkeypatch.setattr(fused, "usable", lambda q: False)
    seen, product = Counter(), native.product
    monkeypatch.setattr(
        native,
        "product",
        lambda _, a, b, *t, **k: seen.update([(1, *a.shape, b.shape[1])]) or product(_, a, b, *t, **k),
    )
    model = create(shape, seed=0)
    x, y = torch.randint(0, shape.vocabulary, (2, 3, shape.sequence))
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile,
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(x, y).backward()
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            a, b = event.input_shapes[-2:] if "add" not in event.name else event.input_shapes[1:3]
            seen[(1, *a, b[1]) if len(a) == 2 else (*a, b[2])] += 1
    expected = Counter()
    for one in step_products(shape, torch.bfloat16, 3):
        times = 2 if (one.name, one.direction) == ("attn.scores", "forward") else 1
        expected[one.batch, one.m, one.k, one.n] += times * one.count
    assert seen == expected


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", ["nt", "nn", "tn"])
def test_a_product_is_called_with_its_sizes(form, batch):
    one = Product("x", "forward", form, 5, 7, 11, batch)
    with FlopCounterMode(display=False) as counter:
        result = call(one, torch.float32)()
    assert result.shape[-2:] == (5, 7)
    assert counter.get_total_flops() == one.flops == 2 * batch * 5 * 7 * 11
    assert one.bytes(2) == 2 * batch * (5 * 11 + 11 * 7 + 5 * 7)
    assert one.bytes(2, 4) == batch * (2 * (5 * 11 + 11 * 7) + 4 * 5 * 7)


def test_fugaku_is_the_talks_layer():
    """h = 7168, 56 heads, 2,048 tokens: QKV h × 3h/t, projection h/t × h, fc1 h × 4h/t, fc2 4h/t × h."""
    for split in FUGAKU_SPLITS:
        found = {(one.name, one.direction): one for one in products(FUGAKU, tensor=split)}
        sizes = {name: (one.m, one.n, one.k) for (name, way), one in found.items() if way == "forward"}
        assert sizes["attn.qkv"] == (2048, 3 * 7168 // split, 7168)
        assert sizes["attn.proj"] == (2048, 7168, 7168 // split)
        assert sizes["mlp.fc"] == (2048, 4 * 7168 // split, 7168)
        assert sizes["mlp.proj"] == (2048, 7168, 4 * 7168 // split)
        assert sizes["attn.scores"] == (2048, 2048, 128)
        assert sizes["attn.values"] == (2048, 128, 2048)
        assert found["attn.scores", "forward"].batch == -(-56 // split)


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt2-1.3b", "llama-7b"])
def test_products_are_99_percent_of_the_step(name):
    shape = find_shape(name)
    matrix = sum(one.step_flops for one in products(shape))
    assert 0.98 < matrix / (matrix + other_flops(shape)) < 0.9999


def test_a_split_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="tensor 3 does not divide width 64"):
        step_products(GPT2, torch.float32, 1, tensor=3)
    assert products(replace(GPT2, heads=1, kv_heads=1), tensor=2)
