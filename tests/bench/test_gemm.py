"""`tozan bench gemm`: every product of a model has its row, with shares that sum to the products' part of the step."""

import json

import pytest

from tozan.bench.result import read
from tozan.cli import main

CONFIG = """
version = 1
[model]
layers = 2
width = 32
heads = 2
vocabulary = 320
sequence = 128
[data]
path = "none"
[train]
steps = 1
"""
WORDS = ["--micro-batch", "1", "--precision", "bf16,fp32", "--threads", "1", "--seconds", "0", "--repeats", "2"]


def test_rows_are_the_products_of_the_step(tmp_path, capsys):
    (tmp_path / "run.toml").write_text(CONFIG)
    out = tmp_path / "gemm.json"
    assert main(["bench", "gemm", str(tmp_path / "run.toml"), *WORDS, "--tensor", "1,2", "--out", str(out)]) == 0
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines())
    found = read(out)
    assert json.loads(out.read_text())["options"]["threads"] == [1]
    groups = {}
    for row in found.rows:
        assert row["bytes"] > 0
        assert row["flops"] == 2 * row["batch"] * row["m"] * row["n"] * row["k"]
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])
        assert 0 < row["peak_share"] <= 1
        groups.setdefault((row["precision"], row["tensor"]), []).append(row)
    assert set(groups) == {(precision, tensor) for precision in ("bf16", "fp32") for tensor in (1, 2)}
    for rows in groups.values():
        assert {row["direction"] for row in rows} == {"forward", "input gradient", "weight gradient"}
        assert 0.5 < sum(row["share"] for row in rows) < 1
        assert len({row.name for row in rows}) == len(rows)
    assert found.peaks["bf16"].measured >= max(row["flops_per_second"] for row in groups["bf16", 1])


@pytest.mark.parametrize("words", [["--precision", "int4"], ["--threads", "0"], ["--tensor", "1,x"], ["--tensor", "3"]])
def test_wrong_lists_are_refused(words, capsys):
    assert main(["bench", "gemm", "gpt2-tiny", *words]) == 2
    assert words[1].rpartition(",")[2] in capsys.readouterr().err
