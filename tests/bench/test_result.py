"""A measurement's file: what is written is read back, what is damaged is named, and noise is told from difference."""

import json
import random
from dataclasses import asdict
from math import comb

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tozan.bench.compare import compare
from tozan.bench.result import Peak, Result, Row, interval, read
from tozan.cli import main
from tozan.errors import UserError

SAMPLES = st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=40)


def result(*rows, **changes):
    given = {
        "kind": "gemm",
        "created": "2026-01-02T03:04:05+0000",
        "machine": {"processor": "x", "cores": 2, "memory_bytes": 1},
        "versions": {"tozan": "0"},
        "rows": list(rows),
    }
    return Result(**given | changes)


@settings(max_examples=20)  # each writes and syncs a file
@given(SAMPLES)
def test_what_is_written_is_read_back(samples):
    import tempfile
    from pathlib import Path

    row = Row.of("a", "FLOP/s", samples, m=3, direction="forward", phases={"x": 1.5})
    made = result(row, peaks={"bf16": Peak(measured=1e12)}, bandwidth=2e10, notes=["ü"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "result.json"
        made.write(path)
        again = read(path)
        jsonschema.validate(json.loads(path.read_text()), Result.model_json_schema())
    assert again == made
    assert again.row("a")["phases"] == {"x": 1.5}
    assert again.row("a")["median"] == row.median
    assert again.row("a").get("n") is None
    assert json.loads(made.json_text())["rows"][0]["m"] == 3, "the kind's own fields lie beside the common ones"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "no result"),
        ('{"format": "tozan plan"}', "no result"),
        ('{"format": "tozan bench", "version": 2}', "version 2"),
        ('{"format": "tozan bench", "version": 1, "kind": "gemm"}', "Field required"),
    ],
)
def test_other_files_are_refused(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read(tmp_path / "x.json")
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path / "nothing.json")


def test_every_damage_of_a_row_is_named(tmp_path):
    found = json.loads(result(Row.of("a", "s", [1.0])).json_text())
    found["rows"][0] |= {"median": 7.0, "repeats": 1}
    found["rows"].append({"name": "b", "unit": "s", "median": None, "low": 1, "high": 1, "repeats": 0})
    (tmp_path / "x.json").write_text(json.dumps(found))
    with pytest.raises(UserError) as error:
        read(tmp_path / "x.json")
    assert {problem.where.rpartition(": ")[2] for problem in error.value.problems} == {
        *("rows.0", "rows.1.median", "rows.1.repeats")
    }


@given(SAMPLES)
def test_interval_holds_the_middle_with_95_percent(samples):
    low, high = interval(samples)
    ordered, n = sorted(samples), len(samples)
    k = next(k for k in range(n) if ordered[k] == low)
    assert low == ordered[k]
    assert low <= ordered[(n - 1) // 2] <= ordered[n // 2] <= high
    if n >= 6:  # the coverage by the binomial distribution, summed from the other side
        inside = max(k for k in range(n // 2 + 1) if ordered[k] == low and ordered[n - 1 - k] == high)
        assert sum(comb(n, i) for i in range(inside + 1, n - inside)) / 2**n >= 0.95 or len(set(samples)) < n


def measured(name, chance, n, factor=1.0):
    return Row.of(name, "s", [factor * chance.lognormvariate(0, 0.2) for _ in range(n)])


@pytest.mark.parametrize(("n", "m"), [(4, 4), (5, 5), (8, 20), (30, 30)])
def test_equal_measurements_rarely_differ_and_unequal_ones_do(n, m):
    chance = random.Random(n)
    a = result(*(measured(str(i), chance, n) for i in range(2000)))
    same = compare(a, result(*(measured(str(i), chance, m) for i in range(2000)))).differences
    assert sum(found.verdict == "differs" for found in same) / 2000 <= 0.05
    slower = compare(a, result(*(measured(str(i), chance, m, 4.0) for i in range(2000)))).differences
    assert sum(found.verdict == "differs" for found in slower) / 2000 >= 0.99


@given(SAMPLES, SAMPLES, st.floats(0.01, 100))
def test_comparing_the_other_way_round_gives_the_inverse(one, two, scale):
    a, b = result(Row.of("x", "s", one)), result(Row.of("x", "s", two))
    [forth], [back] = compare(a, b).differences, compare(b, a).differences
    assert forth.verdict == back.verdict
    assert forth.ratio == pytest.approx(1 / back.ratio)
    assert (forth.low, forth.high) == pytest.approx((1 / back.high, 1 / back.low))
    assert forth.low <= forth.ratio * (1 + 1e-12)
    assert forth.ratio <= forth.high * (1 + 1e-12)
    [scaled] = compare(a, result(Row.of("x", "s", [scale * value for value in two]))).differences
    assert scaled.ratio == pytest.approx(scale * forth.ratio)


def test_unlike_files_are_not_compared_unless_asked(tmp_path, capsys):
    a = result(*(Row.of(name, "s", [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]) for name in "xy"))
    b = result(Row.of("x", "s", [2.0, 2.1, 2.2, 2.3, 2.4, 2.5]), machine={"processor": "y", "cores": 2})
    a.write(tmp_path / "a.json")
    b.write(tmp_path / "b.json")
    words = ["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "processor is 'x' against 'y'" in printed
    assert "not compared" in printed
    assert "differs" not in printed
    assert main([*words, "--anyway"]) == 0
    printed = capsys.readouterr().out
    assert "1.800" in printed, "2.25 over 1.25"
    assert "1.333 to 2.500" in printed, "the ends of both ranges"
    assert "1 differs" in printed
    assert "in one file only: y" in printed
    assert main([*words[:3], "nowhere.json"]) == 2


def test_few_repeats_and_other_machines_are_said():
    a = result(Row.of("x", "s", [1.0, 1.1]), Row.of("only a", "s", [1.0]))
    b = result(Row.of("x", "s", [2.0, 2.1]), machine={"processor": "y", "cores": 2, "memory_bytes": 1}, kind="step")
    found = compare(a, b)
    assert found.differences[0].verdict == "too few repeats"
    assert found.missing == ["only a"]
    assert any("kind step" in warning for warning in found.warnings)
    assert any("processor is 'x' against 'y'" in warning for warning in found.warnings)
    assert not compare(a, a).warnings
    assert compare(a, a).alike
    assert not found.alike
    assert {d["ratio"] for d in map(asdict, compare(a, a).differences)} == {1.0}
