"""The floor of a step: its bytes by hand, its phases by the trainer's clock, its page for eyes."""

import math

import pytest
import torch

from tozan.bench import step
from tozan.bench.gemm import step_products
from tozan.bench.result import read
from tozan.cli import main
from tozan.errors import UserError
from tozan.models.arithmetic import Shape
from tozan.models.traffic import step_bytes

SMALL = ["--model.layers=2", "--model.width=32", "--model.heads=2", "--model.vocabulary=320", "--model.sequence=32"]
SMALL += ["--train.micro_batch=2", "--train.accumulate=2", "--train.precision=fp32", "--train.threads=1"]


def test_bytes_of_one_layer_by_hand():
    """One token, width 2, MLP 8, vocabulary 10, bf16: a sum that fits on a page."""
    shape = Shape("gpt2", 1, 2, 1, 1, 8, 10, 1)
    weights = 2 * 6 + 2 * 2 + 2 * 8 + 8 * 2 + 10 * 2
    norms = 2 * (2 * 4 + 2 * 4 + 2 * 2 + 2 * 2)  # branch and stream in (bf16, fp32), stream and operand out
    forward = norms + (16 + 16) + (8 + 8) + (20 + 20) + (4 + 2) * weights
    backward = 2 * (3 * 2 * 4 + 2 * 2 * 2) + 3 * 16 + (8 + 8) + (2 + 4) * weights
    state = 10 * 2 + 1 * 2 + weights - 20 + (6 + 2 + 8 + 2) + 6 * 2
    assert step_bytes(shape, 1, 1, 2) == {"forward": forward, "backward": backward, "optimizer": 32 * state}
    twice = step_bytes(shape, 1, 2, 2)
    assert twice["forward"] == 2 * forward
    assert twice["backward"] == 2 * backward + 8 * weights


def test_a_step_and_its_floor(tmp_path, capsys):
    out = tmp_path / "step.json"
    words = [
        "bench",
        "step",
        "gpt2-tiny",
        *SMALL,
        "--steps",
        "3",
        "--seconds",
        "0",
        "--repeats",
        "1",
        "--out",
        str(out),
    ]
    assert main([*words, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 100 for line in printed.splitlines())
    assert "page faults per step" in printed
    found = read(out)
    assert {"data", "forward", "backward", "optimizer", "step"} <= {row.name for row in found.rows}
    whole = found.row("step")
    phases = [row for row in found.rows if row.name != "step"]
    assert sum(row.low for row in phases) <= whole.high * 1.01
    assert math.isclose(sum(row["floor_seconds"] for row in phases), whole["floor_seconds"])
    shape = Shape("gpt2", 2, 32, 2, 2, 128, 320, 32)
    listed = step_products(shape, torch.float32, 2, 2)
    assert sum(row["flops"] for row in phases) == sum(one.step_flops for one in listed)
    assert found.row("forward")["gemm_seconds"] > 0 < found.row("backward")["gemm_seconds"]
    assert whole["allocations"] > 100
    assert whole["minor_faults"] >= 0
    assert found.bandwidth > 1e8


def test_several_processes_and_unknown_models_are_refused(capsys):
    with pytest.raises(UserError, match="asks for 2 processes"):
        step.read("gpt2-tiny", ["--layout.data=2"])
    assert main(["bench", "step", "gtp2"]) == 2
    assert "no preset and no file is called 'gtp2'" in capsys.readouterr().err
