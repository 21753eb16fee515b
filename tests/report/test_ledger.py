import json

import pytest

from tozan.errors import UserError
from tozan.report.ledger import by_message, by_rank, rows, table


def write(run, rank, *rows, ranks=(0, 1)):
    (run / "ledger").mkdir(exist_ok=True)
    keys = ("axis", "operation", "name", "count", "bytes", "wait")
    common = {"rank": rank, "transfer": 0.5, "ranks": ranks}
    lines = [json.dumps(common | dict(zip(keys, row, strict=True))) for row in rows]
    (run / "ledger" / f"rank-{rank:06d}.jsonl").write_text("\n".join(lines) + "\n")


def test_sums_over_ranks_and_names_the_one_that_came_last(tmp_path):
    small, large = ("tp", "all_reduce", "norm"), ("dp", "reduce_scatter", "gradients")
    write(tmp_path, 0, (*small, 3, 10, 0.5), (*large, 2, 1_000_000, 4.0))
    write(tmp_path, 1, (*large, 2, 3_000_000, 1.0))
    first, second = by_message(rows(tmp_path))
    assert (first.axis, first.operation, first.name) == large
    assert (first.count, first.bytes, first.wait, first.latest) == (2, 4_000_000, 2.5, 1)
    assert (second.bytes, second.latest) == (10, 0)
    text = table(tmp_path)
    assert "4.00 MB sent by all ranks together" in text
    assert len({line.find("rank ") for line in text.splitlines()[1:3]}) == 1


def test_says_who_waited_for_whom_among_those_that_talk_to_each_other(tmp_path):
    message = ("dp", "reduce_scatter", "gradients", 2, 1_000_000)
    for rank, ranks, wait in ((0, (0, 2), 5.0), (2, (0, 2), 1.0), (1, (1, 3), 0.25), (3, (1, 3), 0.75)):
        write(tmp_path, rank, (*message, wait), ("tp", "all_reduce", "norm", 1, 8, 0.0), ranks=ranks)
    found = by_rank(rows(tmp_path))
    assert [each.waited_for for each in found] == [{2: 4.0}, {}, {}, {1: 0.5}]
    assert [each.wait for each in found] == [5.0, 0.25, 1.0, 0.75]
    assert [each.transfer for each in found] == [1.0] * 4
    assert {each.bytes for each in found} == {1_000_008}
    lines = table(tmp_path).splitlines()[-4:]
    assert lines[0].split()[-4:] == ["rank", "2", "(4.00", "s)"]
    assert [line.split()[4] for line in lines] == ["0.00", "0.50", "4.00", "0.00"]
    assert lines[1].endswith("nobody")


def test_a_run_of_one_process_has_none(tmp_path):
    with pytest.raises(UserError, match="one process"):
        rows(tmp_path)


def test_a_damaged_line_is_named(tmp_path):
    write(tmp_path, 0, ("tp", "all_reduce", "norm", 3, 10, 0.5))
    (tmp_path / "ledger" / "rank-000001.jsonl").write_text('{"axis": "tp"\n')
    with pytest.raises(UserError, match=r"rank-000001\.jsonl:1"):
        rows(tmp_path)
