"""Whole runs: resume, evaluation, signals, skipped steps, the profile, and the depth of the main path."""

import inspect
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tozan
from tozan import checkpoint
from tozan.errors import UserError
from tozan.train import Interrupted, assemble, evaluate, fit, held_out, open_model, train


def records(folder, kind="step"):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def final_hash(folder):
    return checkpoint.state_hash(checkpoint.load(checkpoint.resolve(folder)).tensors)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--model.dropout=0.2", "--train.recompute=full"),
        ("--train.precision=fp16",),
        ("--train.precision=bf16", "--model.family=llama", "--optim.schedule=wsd"),
    ],
    ids=["plain", "dropout", "fp16", "bf16-llama"],
)
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(configure, flags):
    whole = train(configure(*flags, folder="whole"))
    stop_after(configure(*flags, "--checkpoint.every=1", folder="parts"), step=2)
    stop_after(configure(*flags, "--checkpoint.every=1", folder="parts"), step=5)
    parts = train(configure(*flags, folder="parts"))
    assert final_hash(whole.folder) == final_hash(parts.folder)
    last = {r["step"]: r for r in records(parts.folder)}
    for record in records(whole.folder):
        same = last[record["step"]]
        assert (record["loss"], record["grad_norm"], record["lr"]) == (same["loss"], same["grad_norm"], same["lr"])
        assert record["tokens"] == same["tokens"]
    assert [e["event"] for e in records(parts.folder, "event")].count("resumed") == 2


def stop_after(loaded, step):
    """Train until a SIGTERM that arrives while `step` is being reported."""

    def on_record(record):
        if record["kind"] == "step" and record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        train(loaded, on_record)
    assert caught.value.signal == signal.SIGTERM


def test_a_signal_saves_the_step_it_interrupts(configure):
    loaded = configure()
    stop_after(loaded, step=3)
    folder = checkpoint.resolve(assemble(loaded).folder)
    assert folder.name == "step-00000003"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_state_from_memory_is_saved_though_its_checkpoint_was_due_before(configure):
    run = assemble(configure("--checkpoint.every=2"))
    run.step, run.copies.leave = 2, True  # as after a loss while the checkpoint of step 2 was being written
    with pytest.raises(Interrupted):
        fit(run)
    assert checkpoint.resolve(run.folder).name == "step-00000002"


def test_a_finished_run_has_nothing_left_to_do(configure):
    train(configure())
    again = train(configure())
    assert again.step == 6
    assert again.loss is None


def test_a_run_folder_is_private_and_one_that_exists_keeps_its_mode(configure):
    before = os.umask(0)
    try:
        assert assemble(configure()).folder.stat().st_mode & 0o777 == 0o700
        folder = assemble(configure()).folder
        folder.chmod(0o755)
        assert assemble(configure()).folder.stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


def test_too_many_bad_steps_in_a_row_end_the_run(configure):
    run = assemble(configure("--train.max_bad_steps=2", "--train.steps=50"))
    run.split.sync.parameters["norm.weight"].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match="3 steps in a row") as caught:
        fit(run)
    assert "optim.lr" in str(caught.value)
    assert len([e for e in records(run.folder, "event") if e["event"] == "skipped step"]) == 3


def test_another_model_in_the_same_folder_is_refused(configure):
    train(configure("--train.steps=1", "--optim.warmup=0"))
    with pytest.raises(UserError) as caught:
        assemble(configure("--model.layers=3"))
    assert "layers" in str(caught.value)


def test_evaluations_happen_when_due_and_equal_plain_cross_entropy(configure):
    result = train(configure("--eval.every=2"))
    evals = records(result.folder, "eval")
    assert [e["step"] for e in evals] == [0, 2, 4, 6]
    model, _, _ = open_model(result.folder)
    run = assemble(configure("--eval.every=2"))
    windows = torch.from_numpy(run.validation.in_order(4))
    with torch.no_grad():
        logits = model(windows[:, :-1]).double()
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert evals[-1]["loss"] == pytest.approx(expected, rel=1e-5)
    assert evals[-1]["perplexity"] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-4)
    assert evals[-1]["tokens"] == 4 * 32
    assert evaluate(result.folder, samples=4)["loss"] == pytest.approx(expected, rel=1e-5)
    assert held_out(run.split.model.eval(), run.validation, 4, 3, run.precision)["loss"] == pytest.approx(
        expected, rel=1e-5
    )


def test_bits_per_byte_do_not_depend_on_the_tokenizer(configure):
    result = train(configure("--train.steps=1", "--optim.warmup=0"))
    score = evaluate(result.folder, samples=10**6)
    run = assemble(configure("--train.steps=1", "--optim.warmup=0"))
    tokens = run.validation.in_order(10**6)[:, 1:]
    text = open_model(result.folder)[1].decode(tokens.flatten().tolist())
    bits = score["loss"] * score["tokens"] / 0.6931471805599453
    # The stream's end markers decode to text of their own, and its last window may be cut off.
    text = text.replace("<|end|>", "")
    assert score["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=0.01)


def test_records_say_what_the_house_promises(configure):
    result = train(configure("--train.steps=4", "--metrics.every=2"))
    steps = records(result.folder)
    assert [r["step"] for r in steps] == [2, 4]
    facts = json.loads((result.folder / "run.json").read_text())
    for record in steps:
        assert sum(record["phases"].values()) == pytest.approx(record["seconds"], rel=1e-6)
        achieved = record["tokens_per_second"] * facts["model_flops_per_token"]
        assert record["model_flops_per_second"] == pytest.approx(achieved, rel=1e-9)
        assert record["mfu"] == pytest.approx(achieved / facts["peak_measured_flops"], rel=1e-9)
    assert steps[-1]["tokens"] == 4 * 4 * 32
    assert facts["parameters"] == sum(p.numel() for p in open_model(result.folder)[0].parameters())
    # Continued between two records, the first one speaks of the step that was made since.
    (record,) = records(train(configure("--train.steps=5", "--metrics.every=5")).folder)[2:]
    assert record["tokens_per_second"] * record["seconds"] == pytest.approx(4 * 32)


def test_the_profile_is_a_trace(configure):
    result = train(configure("--metrics.profile=[1, 2]"))
    trace = json.loads((result.folder / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::scaled_dot_product_attention" in names


def test_at_most_four_calls_from_the_command_line_to_backward(configure, monkeypatch):
    depths, package = [], str(Path(tozan.__file__).parent)
    plain = torch.Tensor.backward

    def backward(self, *args, **kwargs):
        frames = [frame.function for frame in inspect.stack() if frame.filename.startswith(package)]
        depths.append(frames)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    train(configure("--train.steps=1", "--optim.warmup=0"))
    # The verb calls train(); three frames below it make the fourth call, backward().
    assert depths[0] == ["train_step", "fit", "train"]
