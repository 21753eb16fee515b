import json

import pytest

from tozan.errors import UserError
from tozan.report.ledger import read, table


def write(run, rank, *rows):
    (run / "ledger").mkdir(exist_ok=True)
    keys = ("axis", "operation", "name", "count", "bytes", "wait")
    lines = [json.dumps({"rank": rank, "transfer": 0.0, **dict(zip(keys, row, strict=True))}) for row in rows]
    (run / "ledger" / f"rank-{rank:06d}.jsonl").write_text("\n".join(lines) + "\n")


def test_sums_over_ranks_and_names_the_one_that_came_last(tmp_path):
    small, large = ("tp", "all_reduce", "norm"), ("dp", "reduce_scatter", "gradients")
    write(tmp_path, 0, (*small, 3, 10, 0.5), (*large, 2, 1_000_000, 4.0))
    write(tmp_path, 1, (*large, 2, 3_000_000, 1.0))
    first, second = read(tmp_path)
    assert (first.axis, first.operation, first.name) == large
    assert (first.count, first.bytes, first.wait, first.latest) == (2, 4_000_000, 2.5, 1)
    assert (second.bytes, second.latest) == (10, 0)
    text = table(tmp_path)
    assert "4.00 MB sent by all ranks together" in text
    assert len({line.find("rank ") for line in text.splitlines()[1:3]}) == 1


def test_a_run_of_one_process_has_none(tmp_path):
    with pytest.raises(UserError, match="one process"):
        read(tmp_path)


def test_a_damaged_line_is_named(tmp_path):
    write(tmp_path, 0, ("tp", "all_reduce", "norm", 3, 10, 0.5))
    (tmp_path / "ledger" / "rank-000001.jsonl").write_text('{"axis": "tp"\n')
    with pytest.raises(UserError, match=r"rank-000001\.jsonl:1"):
        read(tmp_path)
