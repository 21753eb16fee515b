"""The step against an independent loop: transformers' GPT-2 with torch's AdamW and clipping."""

import math

import numpy as np
import pytest
import torch
import transformers

from tozan.checkpoint import huggingface
from tozan.optim.schedule import learning_rate
from tozan.train import assemble
from tozan.train.clock import Clock
from tozan.train.step import train_step


def take(run, steps):
    results = []
    for _ in range(steps):
        result = train_step(run, Clock())
        while result.again:  # an odd step counts once it has come out the same twice
            result = train_step(run, Clock())
        results.append(result)
        run.step += 1
        run.samples += run.global_batch
    return results


def test_ten_steps_equal_a_plain_loop_over_transformers(configure, tmp_path):
    run = assemble(configure("--train.steps=10", "--optim.clip=0.5"))
    tensors = {name: p.detach() for name, p in run.split.sync.parameters.items()}
    huggingface.save(run.shape, tensors, tmp_path / "hf", None)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", attn_implementation="eager").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    table = run.config.optim
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    spared = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": table.weight_decay}, {"params": spared, "weight_decay": 0.0}],
        betas=(table.beta1, table.beta2),
        eps=table.eps,
        foreach=False,
    )
    for step in range(10):
        batch = torch.from_numpy(run.data.samples(step * 4, 4))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(table, step, 10)
        logits = model(input_ids=batch[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), table.clip)
        optimizer.step()
        optimizer.zero_grad()
        (got,) = take(run, 1)
        assert got.loss == pytest.approx(expected.item(), rel=2e-5)
        assert got.grad_norm == pytest.approx(norm.item(), rel=2e-4)
        assert got.tokens == 4 * 32


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_large_batch_also_with_ignored_targets(configure, monkeypatch, accumulate):
    large = assemble(configure("--train.micro_batch=4", "--train.accumulate=1", folder="large"))
    small = assemble(
        configure(f"--train.micro_batch={4 // accumulate}", f"--train.accumulate={accumulate}", folder="small")
    )
    for run in (large, small):
        plain = run.data.samples

        def ragged(first, count, plain=plain):
            batch = plain(first, count)
            if first % 4 == 0:
                batch[0, 5:] = -100  # the first sample of a step has far fewer targets than the others
            return batch

        monkeypatch.setattr(run.data, "samples", ragged)
    one, other = take(large, 3), take(small, 3)
    for a, b in zip(one, other, strict=True):
        assert a.tokens == b.tokens < 4 * 32
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)


def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(configure):
    run = assemble(configure())
    take(run, 2)
    before = {name: tensor.clone() for name, tensor in run.state().tensors.items()}
    victim = run.split.sync.parameters["blocks.1.mlp.fc.weight"]
    handle = victim.register_hook(lambda gradient: gradient * math.inf)
    (result,) = take(run, 1)
    handle.remove()
    assert "blocks.1.mlp.fc.weight" in result.skipped
    for name, tensor in run.state().tensors.items():
        assert torch.equal(tensor, before[name]), name
    (again,) = take(run, 1)
    assert again.skipped is None


def test_a_loss_that_is_not_finite_is_named(configure):
    run = assemble(configure())
    with torch.no_grad():
        run.split.sync.parameters["norm.weight"].fill_(math.nan)
    (result,) = take(run, 1)
    assert result.skipped == "loss is nan"


def test_dropout_depends_on_the_sample_only_and_not_on_the_generator(configure):
    runs = [assemble(configure("--model.dropout=0.3", folder=name)) for name in ("one", "other")]
    first = take(runs[0], 2)
    torch.manual_seed(12345)
    np.random.seed(0)
    second = take(runs[1], 2)
    assert [r.loss for r in first] == [r.loss for r in second]
    assert first[0].loss != first[1].loss
