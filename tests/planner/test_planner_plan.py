"""Plans: the best layout is the best, the config loads, questions turned round agree, mistakes are explained."""

import dataclasses
import json
import math
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tozan.cli import main
from tozan.comm.jobs import Job as Started
from tozan.comm.jobs import rank_map
from tozan.config import load as load_config
from tozan.errors import UserError
from tozan.planner import costs, plan, show, stacks
from tozan.planner.export import torus
from tozan.planner.layer import Job
from tozan.planner.losses import losses
from tozan.planner.machine import load, names
from tozan.planner.memory import memory
from tozan.planner.published import gpt
from tozan.planner.search import Options, enumerate_layouts, search
from tozan.schedules import create


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
    """50,000 layouts a second on one core, and all of Fugaku within a minute (with room for a slow machine)."""
    job = Job(gpt(12288, 96, 96, 2048), load("a100-80"), stacks.MEGATRON_2022, 1536)
    search(job, 1024)
    begin = time.process_time()
    tried = sum(search(job, 1024).tried for _ in range(3))
    assert tried / (time.process_time() - begin) > 25_000
    fugaku = Job(gpt(12288, 96, 96, 2048), load("fugaku-2.0"), stacks.TOZAN, 6144, "fp32")
    begin = time.process_time()
    assert search(fugaku, 158_976).fitting > 0
    assert time.process_time() - begin < 60


def test_plan_reads_well_and_its_config_loads(tmp_path):
    found = plan("gpt2-124m", "xeon-amx", 4, 1e9)
    assert found.fits
    assert "Best layouts" in found.text
    assert "runner-up" in found.text
    path = tmp_path / "plan.toml"
    path.write_text(found.config())
    config = load_config(path).config
    assert config.train.steps == math.ceil(1e9 / (found.global_batch * 1024))
    assert config.train.micro_batch == found.choices[0].layout["micro_batch"]


@pytest.mark.parametrize(("machine", "launcher"), [("xeon-amx", "slurm"), ("fugaku-2.0", "pjm")])
def test_the_script_of_a_plan_starts_it(machine, launcher, tmp_path, monkeypatch, capsys):
    found = plan("gpt2-124m", machine, 4, 1e9)
    found.write(folder=tmp_path)
    monkeypatch.chdir(tmp_path)
    words = shlex.split((tmp_path / "launch.sh").read_text().splitlines()[-1])
    assert words[:2] == ["exec", "tozan"]
    assert main([*words[2:], "--launcher", launcher, "--dry-run"]) == 0
    asked = {"slurm": "#SBATCH --nodes=4\n", "pjm": '#PJM -L "node=4"\n'}[launcher]
    assert asked in capsys.readouterr().out


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
    asked = plan("gpt2-350m", "xeon-amx", tokens=7e9, deadline=0.3)  # on the way are nodes that no layout divides
    assert asked.choices[0].days <= 0.3
    assert asked.nodes > 1
    assert plan("gpt2-350m", "xeon-amx", asked.nodes // 2, 7e9).choices[0].days > 0.3
    paid = plan("gpt2-350m", "xeon-amx", tokens=7e9, budget=10 * asked.choices[0].cost)
    assert paid.choices[0].cost <= 10 * asked.choices[0].cost


def test_nodes_that_no_layout_divides_are_a_mistake():
    with pytest.raises(UserError, match="no layout of gpt2-350m uses 7 nodes"):
        plan("gpt2-350m", "xeon-amx", 7, 7e9)


def test_sweep_draws_scaling():
    curve = plan("gpt2-1.3b", "fugaku-2.0", 256, 1e10, sweep="strong").curves["strong"]
    assert [row["nodes"] for row in curve][-1] == 256
    assert curve[0]["efficiency"] == 1
    seconds = [row["seconds"] for row in curve]
    assert seconds == sorted(seconds, reverse=True)


def test_nothing_fits_says_what_would():
    found = plan("175B", "fugaku-2.0", 4, 1e9)
    assert not found.fits
    enough = int(re.search(r"([0-9,]+) nodes are enough", found.advice[0])[1].replace(",", ""))
    assert plan("175B", "fugaku-2.0", enough, 1e9).fits
    assert not plan("175B", "fugaku-2.0", enough // 2, 1e9).fits


def test_what_is_out_of_reach_says_what_comes_nearest():
    with pytest.raises(UserError, match=r"soonest is .* nodes: .* days") as late:
        plan("gpt2-124m", "xeon-amx", tokens=1e13, deadline=0.1)
    less = float(re.search(r"at most (\S+) tokens", str(late.value))[1])
    assert plan("gpt2-124m", "xeon-amx", tokens=0.9 * less, deadline=0.1).choices[0].days <= 0.1
    with pytest.raises(UserError, match=r"cheapest is .* nodes?") as dear:
        plan("gpt2-124m", "xeon-amx", tokens=1e12, budget=10)
    enough = float(re.search(r"a budget of ([\d,]+)", str(dear.value))[1].replace(",", ""))
    assert plan("gpt2-124m", "xeon-amx", tokens=1e12, budget=enough).choices[0].cost <= enough
    with pytest.raises(UserError, match="a budget of"):
        plan("gpt2-124m", "xeon-amx", tokens=1e12, budget=0.99 * enough)


def test_nodes_that_miss_the_deadline_or_the_budget_say_so():
    found = plan("175B", "a100-80", 16, 300e9, deadline=3, budget=1000)
    best = found.choices[0]
    assert best.days > 100
    assert f"Misses the deadline of 3 days: the best takes {best.days:.0f} days." in found.text
    assert f"Exceeds the budget of 1,000: the best costs {best.cost:,.0f} USD." in found.text.replace("\n", " ")
    met = plan("175B", "a100-80", 16, 300e9, deadline=best.days + 1, budget=best.cost + 1)
    assert not any("deadline" in sentence for sentence in met.advice)


def test_answers_have_no_exponents_and_explain_their_words():
    found = plan("175B", "a100-80", 16)
    assert found.choices[0].days >= 1000
    assert not re.search(r"\de[+-]\d", found.text)
    used = [word for word, value in found.choices[0].parts.items() if value > 0.01 * found.choices[0].seconds]
    assert all(f"{word}: " in found.text for word in used if word in show.MEANINGS)
    with pytest.raises(UserError, match="300 is less than one step, 4,194,304 tokens"):
        plan("175B", "a100-80", 16, 300)


def test_a_plan_as_data_says_the_same(tmp_path):
    found = plan("gpt2-1.3b", "fugaku-2.0", 96, 1e9, sweep="both")
    found.write(tmp_path)
    data = json.loads((tmp_path / "plan.json").read_text())
    assert (data["format"], data["version"], data["nodes"]) == ("tozan plan", 1, 96)
    best = data["layouts"][0]
    assert best["low"] < best["seconds"] < best["high"]
    assert sum(best["breakdown"].values()) == pytest.approx(best["seconds"])
    assert sum(best["memory"].values()) <= best["memory_limit"]
    assert len(data["blocks"]) == 24
    assert {kind: rows[-1]["nodes"] for kind, rows in data["curves"].items()} == {"strong": 96, "weak": 96}
    assert len(data["torus"]["ranks"]) == best["devices"]


def test_ranks_sit_where_the_launcher_puts_them():
    """The same map as PJM's, on the most compact block of nodes inside Fugaku's torus."""
    found = torus(load("fugaku-2.0"), 13824)
    assert found["shape"] == [24, 24, 24]
    lines = rank_map(Started(("true",), 13824, 13824, shape=(24, 24, 24))).split()
    assert [f"({x},{y},{z})" for x, y, z in found["ranks"]] == lines
    assert torus(load("a100-80"), 8) is None


def test_a_pipeline_is_drawn_from_the_trainers_schedule():
    found = plan("gpt2-124m", "xeon-amx", 4, 1e9, global_batch=16)
    layout = {**found.choices[0].layout, "pp": 4, "dp": 1, "tp": 1, "grid": 0, "depth": 1, "cp": 1}
    layout |= {"chunks": 1, "micro_batch": 2, "zero": 0, "zero_bubble": 0, "sequence_parallel": 0}
    choice = dataclasses.replace(found.choices[0], layout=layout)
    pipeline = dataclasses.replace(found, choices=[choice]).data()["pipeline"]
    assert (pipeline["schedule"], pipeline["stages"], pipeline["microbatches"]) == ("1f1b", 4, 8)
    schedule = create("1f1b", 4, 8)
    assert len(pipeline["timeline"]) == sum(map(len, schedule.actions))


def test_failures_follow_daly():
    machine = load("fugaku-2.0")
    shape = gpt(12288, 96, 96, 2048)
    small, large = losses(machine, shape, 1000), losses(machine, shape, 100_000)
    assert large.interval < small.interval
    assert 0 < small.share < large.share < 1


def test_what_failures_and_money_are_is_said():
    found = plan("gpt2-124m", "xeon-amx", 4, 1e9)
    said = " ".join(found.text.split())
    lost, economy = found.choices[0].losses, found.machine.economy
    # Nodes that fail once in 100,000 hours each; 12 bytes a parameter at 1 GB/s from each of four.
    assert lost.between == 25_000 * 3600
    assert lost.write == pytest.approx(12 * 124_475_904 / 4e9)
    assert f"Days include {100 * lost.share:.3g}% for failures" in said
    assert "one of the nodes fails every 1041 d 16 h, a checkpoint every 2 h 16 min takes 373 ms" in said
    assert "USD: 1.6 for a device and hour." in said
    data = found.data()
    assert (data["currency"], data["price_per_device_hour"]) == (economy.currency, economy.price)
    hours = 24 * data["layouts"][0]["days"]
    assert data["layouts"][0]["cost"] == pytest.approx(economy.price * data["layouts"][0]["devices"] * hours)


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
