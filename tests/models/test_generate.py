"""Generation against transformers and against running the model without a cache."""

import collections

import pytest
import torch

from tozan.errors import UserError
from tozan.models.generate import generate


def run(*arguments, **options):
    return torch.stack(list(generate(*arguments, **options)), dim=1)


def test_greedy_tokens_equal_transformers(shape, tokens, random_model, transformers_twin):
    model = random_model(shape)
    prompt = tokens(model.shape, samples=3, length=6)
    expected = transformers_twin(model).generate(
        prompt, max_new_tokens=18, do_sample=False, attention_mask=torch.ones_like(prompt), pad_token_id=0
    )
    assert torch.equal(run(model, prompt, 18), expected[:, 6:])


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
@pytest.mark.parametrize("length", [5, 24, 40])
def test_window_restarts_at_half_and_equals_no_cache(name, length, shapes, tokens, random_model):
    model = random_model(shapes[name])
    prompt = tokens(model.shape, length=length)
    found = run(model, prompt, 30)
    context, start = prompt, max(0, length - 24)
    for step in range(30):
        if context.shape[1] - start > 24:
            start = context.shape[1] - 12
        with torch.no_grad():
            following = model(context[:, start:])[:, -1].argmax(-1)
        assert torch.equal(found[:, step], following), step
        context = torch.cat((context, following[:, None]), dim=1)


def test_sampling_is_seeded_and_follows_the_probabilities(shapes, tokens, random_model):
    model = random_model(shapes["gpt2"])
    prompt = tokens(model.shape, samples=1, length=4).expand(4000, 4)
    with torch.no_grad():
        p = torch.softmax(model(prompt[:1])[0, -1] / 0.7, dim=-1)
    drawn = run(model, prompt, 1, temperature=0.7, seed=5)[:, 0]
    assert torch.equal(drawn, run(model, prompt, 1, temperature=0.7, seed=5)[:, 0])
    assert not torch.equal(drawn, run(model, prompt, 1, temperature=0.7, seed=6)[:, 0])
    found = torch.bincount(drawn, minlength=131) / 4000
    assert (found - p).abs().max() < 4 * (0.25 / 4000) ** 0.5


@pytest.mark.parametrize(("options", "allowed"), [({"top_k": 3}, 3), ({"top_p": 0.6}, None), ({"top_k": 1}, 1)])
def test_top_k_and_top_p_keep_the_most_likely(options, allowed, shapes, tokens, random_model):
    model = random_model(shapes["llama"])
    prompt = tokens(model.shape, samples=1, length=4).expand(1000, 4)
    with torch.no_grad():
        p, order = torch.softmax(model(prompt[:1])[0, -1], dim=-1).sort(descending=True)
    if allowed is None:
        allowed = int((p.cumsum(0) < 0.6).sum()) + 1
    drawn = collections.Counter(run(model, prompt, 1, temperature=1.0, **options)[:, 0].tolist())
    kept = order[:allowed].tolist()
    assert set(drawn) <= set(kept)
    shares = p[:allowed] / p[:allowed].sum()
    for token, share in zip(kept, shares.tolist(), strict=True):
        assert abs(drawn[token] / 1000 - share) < 0.08


def test_tiny_top_p_is_greedy(shapes, tokens, random_model):
    model = random_model(shapes["gpt2"])
    prompt = tokens(model.shape, length=4)
    assert torch.equal(run(model, prompt, 8, temperature=1.0, top_p=1e-9), run(model, prompt, 8))


def test_stop_tokens_end_each_sample(shapes, tokens, random_model):
    model = random_model(shapes["gpt2"])
    prompt = tokens(model.shape, samples=2, length=4)
    free = run(model, prompt, 12)
    stop = free[0, 3].item()
    stopped = run(model, prompt, 12, stop=[stop])
    for row, expected in zip(stopped.tolist(), free.tolist(), strict=True):
        end = expected.index(stop) + 1 if stop in expected else len(row)
        assert row[:end] == expected[: min(end, len(row))]
        assert set(row[end:]) <= {stop}
    alone = run(model, prompt[:1], 12, stop=[stop])
    assert alone[0].tolist() == free[0, : free[0].tolist().index(stop) + 1].tolist()


def test_model_keeps_its_mode_and_makes_no_graph(shapes, tokens, random_model):
    model = random_model(shapes["gpt2"]).train()
    assert list(generate(model, tokens(model.shape, length=3), 0)) == []
    steps = generate(model, tokens(model.shape, length=3), 3)
    assert not next(steps).requires_grad
    assert model.training
    assert torch.is_grad_enabled()


def test_all_mistakes_at_once(shapes, tokens, random_model):
    model = random_model(shapes["gpt2"])
    with pytest.raises(UserError) as error:
        generate(model, torch.full((1, 3), 131), -1, temperature=-0.5, top_k=0, top_p=1.5)
    assert [problem.where for problem in error.value.problems] == ["prompt", "max_new", "temperature", "top_k", "top_p"]
    assert "0 to 130" in str(error.value)
    with pytest.raises(UserError, match="1 × 0"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 1)
