"""Pages of measurements and plans: dispatch, numbers checked against the files, figures from Python."""

import csv
import io
import json
import re

import pytest
from made_ranks import make_collectives, make_gemm, make_plan, make_scaling
from made_run import make_run

import tozan
from tozan.bench.result import Peak, read
from tozan.errors import UserError
from tozan.report import bench_page, kind_of, plan_page
from tozan.report.figures import kernels, plans, scaling, torus


def rows_of(figure):
    return list(csv.DictReader(io.StringIO(figure.csv)))


def test_a_path_says_what_it_is(tmp_path):
    assert kind_of(make_run(tmp_path / "run", 20)) == "run"
    assert kind_of(make_plan(tmp_path / "plan")) == "plan"
    assert kind_of(tmp_path / "plan" / "plan.json") == "plan"
    assert kind_of(make_gemm(tmp_path / "b" / "gemm.json")) == "bench"
    assert kind_of(tmp_path / "b") == "bench"
    (tmp_path / "other.json").write_text('{"format": "other"}')
    for nothing in (tmp_path / "none", tmp_path / "other.json", tmp_path / "plan" / "nothing"):
        with pytest.raises(UserError, match="not a run folder"):
            kind_of(nothing)


def test_the_roofline_places_products_by_flops_over_bytes(tmp_path):
    result = read(make_gemm(tmp_path / "gemm.json"))
    rows = rows_of(kernels.roofline(result))
    assert len(rows) == len(result.rows)
    for row in rows:
        m, n, k, batch = (int(row[name]) for name in ("m", "n", "k", "batch"))
        moved = {"fp32": 4, "bf16": 2}[row["precision"]] * batch * (m * n + n * k + m * k)
        assert float(row["flops_per_byte"]) == pytest.approx(2 * m * n * k * batch / moved)
        assert float(row["flops_per_second"]) <= float(row["flops_per_byte"]) * result.bandwidth
    worst = kernels.slowest_products(result, 1)[0]
    assert worst[0].startswith("head"), "the largest share of the FLOPs at the same rate takes longest"


def test_scaling_is_held_against_ideal_and_prediction(tmp_path):
    found = scaling.points(read(make_scaling(tmp_path / "s.json", 8)))
    rows = rows_of(scaling.curve(found))
    first = float(rows[0]["seconds"])
    assert [float(row["ideal_seconds"]) for row in rows] == pytest.approx([first / n for n in (1, 2, 4, 8)])
    assert "waiting for dp" in scaling.breakdown(found).description.rpartition(". ")[2]
    stacked = rows_of(scaling.breakdown(found))
    assert [sum(float(v) for k, v in row.items() if k != "ranks") for row in stacked] == pytest.approx(
        [point.seconds for point in found]
    )


def test_the_talks_table_is_reproduced_from_its_numbers():
    """1.3B on Fugaku, page "FLOPs Achieved": 4,096 CPUs at 0.41 TFLOP/s each are 7% of 6.144 TFLOP/s."""
    point = scaling.Point(
        4096, 1024, 4, 1.0, 1.0, 1.0, 1.0, 0.41e12 * 4096, None, {}, Peak(measured=4.1e12, nominal=6.144e12)
    )
    (row,) = scaling.talk_table([point])
    assert row[:3] == ("4,096", "1,024", "4")
    assert row[3:6] == ("0.41", "6.67%", "10%")
    assert float(row[6]) == pytest.approx(1.640 * 1.024, rel=2e-3), "the talk divides by 1,024"
    assert float(row[7]) == pytest.approx(11.97 * 1.024, rel=5e-3)


def test_a_folder_shows_the_newest_of_each_kind(tmp_path):
    make_gemm(tmp_path / "a.json")
    older = json.loads((tmp_path / "a.json").read_text()) | {"created": "2020-01-01T00:00:00+00:00"}
    (tmp_path / "z.json").write_text(json.dumps(older))
    make_collectives(tmp_path / "c.json")
    (tmp_path / "note.json").write_text("{}")
    found = bench_page.read_all(tmp_path)
    assert [result.kind for result in found] == ["gemm", "collectives"]
    assert found[0].created.startswith("2026")


def test_a_plans_page_says_what_it_holds(tmp_path):
    page = plan_page.page(plan_page.read(make_plan(tmp_path / "plan")))
    text = page.html()
    assert "126 days" in text
    assert "107 days to 151 days" in text
    assert "pp4 dp12 tp2, micro-batch 1, ZeRO-1, recompute selective" in text
    assert "cost, JPY" in text
    assert "43.5 million" in text
    assert "Cost: 150 JPY for a device and hour." in text
    assert "Days include 0.0123% for failures and checkpoints" in text
    assert "one of the nodes fails every 43 d 0 h, a checkpoint every 57 min 00 s takes 1.60 s to write" in text
    torus = next(figure for figure in page.figures if figure.name == "torus")
    rows = rows_of(torus)
    assert len({tuple(row[f"x{i}"] for i in range(5)) for row in rows}) == len(rows) == 96
    (tmp_path / "plan" / "plan.json").write_text('{"format": "tozan plan", "version": 2}')
    with pytest.raises(UserError, match="version 1"):
        plan_page.read(tmp_path / "plan")


def test_figures_come_to_a_notebook(tmp_path):
    found = tozan.figures(make_gemm(tmp_path / "gemm.json"))
    assert list(found) == ["roofline"]
    assert found["roofline"]._repr_html_().startswith("<figure>")
    assert found["roofline"]._repr_svg_().startswith("<svg")


def test_neighbouring_groups_of_a_torus_have_their_own_colours():
    """60 tensor groups of four on 6 × 8 × 5: far more groups than colours."""
    shape, ranks = (6, 8, 5), range(240)
    places = {rank: (rank // 4 % 3 * 2 + rank % 2, rank // 12 % 4 * 2 + rank // 2 % 2, rank // 48) for rank in ranks}
    group = {rank: rank // 4 for rank in ranks}
    colours = torus._colours(torus._slices(shape, places, 5), group)
    assert len(set(places.values())) == 240
    assert len(set(colours.values())) > 3
    at = {place: group[rank] for rank, place in places.items()}
    for (x, y, z), mine in at.items():
        for other in {at.get((x + i, y + j, z), mine) for i in (-1, 0, 1) for j in (-1, 0, 1)} - {mine}:
            assert colours[other] != colours[mine]
    assert torus.farthest(shape, list(places.values()), list(group.values())) == 2, "squares of 2 × 2"
    assert torus.farthest((6,), [(0,), (5,), (2,)], [0, 0, 0]) == 3, "a ring: 5 and 2 are 3 apart, 0 and 5 are 1"
    drawn = torus.torus(shape, places, group, "tensor")
    assert "60 tensor groups" in drawn.caption
    assert "at most 2 hops" in drawn.description


@pytest.mark.parametrize(("kind", "times"), [("weak", [24.0, 24.3, 23.6]), ("strong", [80.0, 45.0, 28.0])])
def test_the_time_of_a_curve_can_be_read_off(kind, times):
    rows = [{"nodes": float(2**power), "seconds": value} for power, value in enumerate(times)]
    for drawing in plans.curves(rows, kind).svg.values():
        labels = re.findall(r">\s*([\d.]+) s\s*<", drawing)
        assert len(labels) >= 2
        assert min(times) / 2 < max(map(float, labels)) <= 2 * max(times)
