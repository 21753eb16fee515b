"""Published tables: every row is read, the bars that are met stay met, the talk's pages close."""

import csv
from pathlib import Path

import pytest

from tozan.errors import UserError
from tozan.planner import costs, others, published, talk, validate
from tozan.planner.candidates import candidates
from tozan.planner.published import READERS, cases, megatron_seconds
from tozan.planner.table import rows
from tozan.planner.validate import BARS

SOURCES = {*others.READERS, "seed_how_long"}


@pytest.fixture(scope="module")
def report():
    return validate()


@pytest.mark.parametrize("table", [*READERS, *sorted(SOURCES)])
def test_every_table_has_its_source(table):
    for row in rows(table):
        assert row["source"]
        assert row["use"] in ("calibration", "public")


def test_rows_are_not_dropped_in_silence():
    for table in READERS:
        left_out = {"torchtitan": 5, "deepspeed_zero_offload_infinity": 6}.get(table, 0)
        per_row = 2 if table == "korthikanti_table5" else 1
        assert len(cases(table)) == per_row * (len(rows(table)) - left_out)


def test_layouts_use_the_devices_they_say():
    for table in ("megatron_sc21_table1", "vtrain_multi", "megatron_readme_h100_weak", "mtnlg_530b"):
        for row, case in zip(rows(table), cases(table), strict=True):
            assert int(case.layout.ranks[0]) == int(row["gpus"])


def test_megatron_flops_give_its_iteration_times():
    """SC21 table 1 has both TFLOP/s and the iteration time that follows: within its rounding."""
    for row, case in zip(rows("megatron_sc21_table1"), cases("megatron_sc21_table1"), strict=True):
        job = case.job
        seconds = megatron_seconds(job.shape, job.global_batch, int(row["gpus"]), float(row["tflops_per_gpu"]), True)
        assert seconds == pytest.approx(case.seconds, rel=0.01)


def test_bars_that_are_met_stay_met(report):
    missed = {line.table: line.error for line in report.lines if line.table in BARS and line.error > BARS[line.table]}
    assert set(missed) <= {"megatron_readme_h100_weak"}
    assert all(error < 0.05 for error in missed.values())


def test_better_than_one_constant_where_layouts_differ(report):
    for line in report.lines:
        if line.table in (
            "vtrain_multi",
            "vtrain_single",
            "seed_fugaku_1p3B",
            "korthikanti_table5",
            "mosaicml_llmfoundry",
        ):
            assert line.error < 0.75 * line.constant


def test_layouts_are_ranked(report):
    """τ over jobs and over pairs, and regret: the bars."""
    assert report.kendall_jobs >= 0.75
    assert report.kendall >= 0.75
    assert report.regret <= 0.02


def test_intervals_hold_what_they_say(report):
    share, count = report.coverage["public"]
    assert count > 40
    assert 0.75 <= share <= 0.85


def test_the_page_prints_what_validate_prints(report):
    page = (Path(__file__).parents[2] / "docs" / "planner.md").read_text(encoding="utf-8")
    for line in report.text.splitlines():
        assert line.strip() in page


def test_nothing_that_ran_out_of_memory_fits(report):
    assert any("does not fit" in note for note in report.notes)


def test_talk_days_are_its_own_division():
    entries = talk("days").pages["days"]
    for row, entry in zip(rows("seed_how_long"), entries, strict=True):
        assert entry["days_at_peak"] == pytest.approx(float(row["recomputed_days_at_peak"]), rel=0.005)


def test_talk_table_follows_its_conventions():
    entries = talk("table").pages["table"]
    for row, entry in zip(rows("seed_fugaku_1p3B"), entries, strict=True):
        scale = entry["talk"] / entry["predicted"]
        assert entry["pflops"] * scale == pytest.approx(float(row["aggregate_pflops"]), abs=0.002, rel=0.01)
        assert entry["a100s"] * scale == pytest.approx(float(row["a100_equiv"]), abs=0.006, rel=0.01)
        assert 100 * entry["peak_share"] * scale == pytest.approx(float(row["pct_peak"]), abs=0.6)


def test_talk_refuses_unknown_pages():
    with pytest.raises(ValueError, match="no page 'cooking'"):
        talk("cooking")
    assert set(talk().pages) == {"days", "weather", "trends", "table"}


def test_shape_of_hits_the_size():
    for billions in (0.35, 1.3, 13, 175, 1000):
        from tozan.models.arithmetic import parameters

        assert parameters(published.shape_of(billions, 2048)) == pytest.approx(billions * 1e9, rel=0.12)


def test_rows_of_ones_own_are_read_in_place_of_ours(tmp_path):
    """What a checker holds back goes through the same readers; what cannot be read is said with its file."""
    with pytest.raises(UserError, match="holds no row of any table"):
        validate(folder=tmp_path)
    kept = rows("vtrain_multi")[:7]
    path = tmp_path / "vtrain_multi.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, kept[0])
        writer.writeheader()
        writer.writerows(row | {"use": "held out"} for row in kept)
    found = validate(folder=tmp_path)
    expected = [case.predict() / case.seconds - 1 for case in cases("vtrain_multi")[:7]]
    (line,) = found.lines
    assert (line.table, line.count) == ("vtrain_multi", 7)
    assert line.error == pytest.approx(sum(map(abs, expected)) / 7)
    assert "of 7 held out rows" in found.text


def test_every_mistake_in_a_folder_of_tables_is_said_at_once(tmp_path):
    """Columns that are missing, values that are no sizes, names that are not known, files that are no text."""

    def write(table, *changes):
        lines = [",".join(rows(table)[0]), *(",".join(row.values()) for row in rows(table)[:2])]
        for line, old, new in changes:
            lines[line] = lines[line].replace(old, new, 1)
        (tmp_path / f"{table}.csv").write_text("\n".join(lines) + "\n")

    write("vtrain_multi", (0, "micro_batch", "micro"), (0, "heads", "hds"))
    write("vtrain_single", (1, "8,32,4", "8,32,four"), (2, "8,4,2", "0,nan,2.5"))
    write("nanotron_best_configs", (1, "16,2048", "15.5,2048"))
    write("mosaicml_llmfoundry", (2, "30b", "31b"))
    write("korthikanti_memory", (1, "none", "zilch"))
    (tmp_path / "llama1_energy.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError) as caught:
        validate(folder=tmp_path)
    found = [str(problem).removeprefix(f"{tmp_path}/").partition("\n")[0] for problem in caught.value.problems]
    assert found == [
        "vtrain_multi.csv: has no column heads, micro_batch; columns that its table does not have: hds, micro",
        "vtrain_single.csv:2: micro_batch = 'four': not a number",
        "vtrain_single.csv:3: global_batch = 'nan': not a finite number above 0",
        "vtrain_single.csv:3: gpus = '0': not a finite number above 0",
        "mosaicml_llmfoundry.csv:3: model = '31b': not known",
        "nanotron_best_configs.csv:2: layers = '15.5': not a whole number",
        "korthikanti_memory.csv:2: mode = 'zilch': not known",
        "llama1_energy.csv: not a table: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ]


def test_every_kind_of_table_can_be_held_out(tmp_path, report):
    """Those without step times, too, and a use need not be said; the first and the last row of each are enough."""
    for table in [*READERS, *others.READERS]:
        found = [{key: value for key, value in row.items() if key != "use"} for row in rows(table)]
        found = found if table in others.READERS else [found[0], found[-1]]
        with (tmp_path / f"{table}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, found[0])
            writer.writeheader()
            writer.writerows(found)
    again = validate(folder=tmp_path)
    assert [line.table for line in again.lines] == [line.table for line in report.lines]
    whole = {line.table: (line.count, line.error) for line in report.lines}
    assert all((line.count, line.error) == whole[line.table] for line in again.lines[-5:])
    assert "held out rows" in again.text


def test_a_tied_table_is_added_up_inside_a_node_where_its_stages_share_one():
    """Not over the network, which half the bytes on two nodes cannot avoid."""
    job = cases("vtrain_single")[-1].job
    inside, apart = (float(costs.step(job, candidates(pp=2, tp=tp)).parts["data"][0]) for tp in (4, 8))
    moved = 51200 * job.shape.width * 2 / 8
    assert moved / job.machine.network.bandwidth < apart < 1.5 * moved / job.machine.network.bandwidth
    assert 2 * moved / job.machine.node.bandwidth < inside < apart / 5
