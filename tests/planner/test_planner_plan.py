"""Plans: the best layout is the best, the config loads, questions turned round agree, mistakes are explained."""

import dataclasses
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tozan.config import load as load_config
from tozan.errors import UserError
from tozan.planner import costs, plan, stacks
from tozan.planner.layer import Job
from tozan.planner.machine import load, names
from tozan.planner.memory import memory
from tozan.planner.plan import failures
from tozan.planner.published import gpt
from tozan.planner.search import Options, enumerate_layouts, search


def test_search_finds_the_minimum_of_what_it_enumerates():
    job = Job(gpt(2048, 24, 16, 1024), load("a100-80"), stacks.MEGATRON_2022, 64)
    every = enumerate_layouts(job, 16, Options())
    fits = memory(job, every).fits(job)
    best = costs.step(job, every.pick(fits)).seconds.min()
    found = search(job, 16)
    assert found.seconds[0] == best
    assert found.tried == len(every)
    assert (np.diff(found.seconds) >= 0).all()


def test_every_candidate_is_a_layout():
    job = Job(gpt(2048, 24, 16, 1024), load("a100-80"), stacks.TOZAN, 64)
    every = enumerate_layouts(job, 24, Options())
    assert (every.ranks <= 24).all()
    assert (job.global_batch % (every.dp * every.micro_batch) == 0).all()
    for index in range(0, len(every), max(1, len(every) // 50)):
        assert every.layout(index).world_size == every.ranks[index]


def test_search_is_fast():
    """50,000 layouts a second on one core, and all of Fugaku within a minute (with room for a busy machine)."""
    job = Job(gpt(12288, 96, 96, 2048), load("a100-80"), stacks.MEGATRON_2022, 1536)
    search(job, 1024)
    rate = max((lambda f: f.tried / f.elapsed)(search(job, 1024)) for _ in range(3))
    assert rate > 25_000
    fugaku = Job(gpt(12288, 96, 96, 2048), load("fugaku-2.0"), stacks.TOZAN, 6144, "fp32")
    begin = time.perf_counter()
    assert search(fugaku, 158_976).fitting > 0
    assert time.perf_counter() - begin < 60


def test_plan_reads_well_and_its_config_loads(tmp_path):
    found = plan("gpt2-124m", "xeon-amx", 4, 1e9)
    assert found.fits
    assert "Best layouts" in found.text
    assert "runner-up" in found.text
    assert "<html" in found.html()
    path = tmp_path / "plan.toml"
    path.write_text(found.config())
    config = load_config(path).config
    assert config.train.steps == math.ceil(1e9 / (found.global_batch * 1024))
    assert config.train.micro_batch == found.choices[0].layout["micro_batch"]
    assert "#SBATCH" in found.launch()


@pytest.mark.parametrize(
    "wanted",
    [
        {"pp": 4, "dp": 2, "tp": 2, "chunks": 2, "sequence_parallel": 1},
        {"pp": 2, "zero_bubble": 1, "zero": 1, "dp": 4},
        {"tp": 8, "grid": 2, "depth": 2, "dp": 3, "zero": 3},
        {"tp": 9, "grid": 3},
    ],
)
def test_the_config_says_the_whole_layout(wanted, tmp_path):
    found = plan("gpt2-124m", "xeon-amx", 4, 1e9)
    plain = {"pp": 1, "dp": 1, "cp": 1, "tp": 1, "grid": 0, "depth": 1, "chunks": 1, "zero": 0}
    layout = {**found.choices[0].layout, **plain, "sequence_parallel": 0, "zero_bubble": 0, **wanted}
    choice = dataclasses.replace(found.choices[0], layout=layout)
    path = tmp_path / "plan.toml"
    path.write_text(dataclasses.replace(found, choices=[choice], global_batch=144 * layout["micro_batch"]).config())
    table = load_config(path).config.layout
    assert (table.pipeline, table.data, table.tensor, table.zero) == tuple(
        layout[k] for k in ("pp", "dp", "tp", "zero")
    )
    assert table.scheme == ("1d" if not layout["grid"] else "2.5d" if layout["depth"] > 1 else "2d")
    assert (table.depth, table.chunks) == (layout["depth"], layout["chunks"])
    assert table.sequence_parallel == bool(layout["sequence_parallel"])
    assert (table.schedule == "zero-bubble") == bool(layout["zero_bubble"])


def test_memory_and_interval_of_a_choice():
    choice = plan("gpt2-1.3b", "fugaku-2.0", 64, 1e10).choices[0]
    assert choice.low < choice.seconds < choice.high
    assert sum(choice.memory.values()) <= 32e9
    assert sum(choice.parts.values()) == pytest.approx(choice.seconds)


def test_deadline_and_budget_turn_the_question_round():
    asked = plan("gpt2-1.3b", "a100-80", tokens=26e9, deadline=2.0)
    assert asked.choices[0].days <= 2.0
    fewer = plan("gpt2-1.3b", "a100-80", max(1, asked.nodes // 2), 26e9)
    assert asked.nodes == 1 or fewer.choices[0].days > 2.0
    paid = plan("gpt2-1.3b", "a100-80", tokens=26e9, budget=10 * asked.choices[0].cost)
    assert paid.choices[0].cost <= 10 * asked.choices[0].cost


def test_sweep_draws_scaling():
    curve = plan("gpt2-1.3b", "fugaku-2.0", 256, 1e10, sweep="strong").curve
    assert [row["nodes"] for row in curve][-1] == 256
    assert curve[0]["efficiency"] == 1
    seconds = [row["seconds"] for row in curve]
    assert seconds == sorted(seconds, reverse=True)


def test_nothing_fits_says_what_is_missing():
    found = plan("175B", "fugaku-2.0", 4, 1e9)
    assert not found.fits
    assert "Nothing fits" in found.text


def test_failures_follow_daly():
    machine = load("fugaku-2.0")
    shape = gpt(12288, 96, 96, 2048)
    _, small = failures(machine, shape, 1000)
    share, large = failures(machine, shape, 100_000)
    assert large < small
    assert 0 < share < 1


def test_all_mistakes_at_once():
    with pytest.raises(UserError) as caught:
        plan("gpt2-124m", "fugaku-2.0", 200_000, stack="nope", deadline=-1)
    assert len(caught.value.problems) == 3
    with pytest.raises(UserError, match="no preset and no file"):
        plan("gpt5", "fugaku-2.0")


def test_machines_load_and_name_their_sources():
    for name in names():
        machine = load(name)
        assert machine.sources
        assert machine.device.gemm.efficiency <= 1


def test_a_bad_machine_file_is_explained(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nnodes = 0\ncolour = "red"\n')
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert {"nodes", "colour", "device", "network", "sources"} <= {
        p.where.split(": ")[1] for p in caught.value.problems
    }
    with pytest.raises(UserError, match="no machine and no file"):
        load("cray-1")


def test_the_pages_machine_file_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "planner.md").read_text(encoding="utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(page.split("```toml\n")[1].split("```")[0])
    assert plan("gpt2-124m", str(path), 4, 1e9).fits


def test_planner_imports_no_torch():
    code = "import sys, tozan.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
