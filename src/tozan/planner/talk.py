"""`tozan plan talk`: the pages of the talk that this project grew from, reproduced and predicted.

R. Yokota, "Distributed Training of Large Language Models on Fugaku", 2023-03-28. Every number states its convention;
where the talk's own arithmetic does not close, that is said too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log2, sqrt
from typing import Any

from tozan.models.arithmetic import Shape, hardware_flops, model_flops
from tozan.planner import costs, published, stacks
from tozan.planner.candidates import Candidates, candidates
from tozan.planner.layer import Job
from tozan.planner.machine import load
from tozan.planner.memory import memory
from tozan.planner.published import gpt
from tozan.planner.search import search
from tozan.planner.table import rows

DAY = 86400.0
PAGES = ("days", "weather", "trends", "table")


@dataclass
class Talk:
    """The pages asked for: rows of numbers by page, and all of them as text."""

    pages: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    text: str = ""


def talk(page: str | None = None) -> Talk:
    """Reproduce the talk's pages.

    Args:
        page: `days` (to train GPT-3, 3.5 and 4), `weather` (GPT-4 against a weather simulation), `trends` (compute, and
            compute-optimal sizes) or `table` (the 1.3B model on 1 to 4,096 CPUs); None: all.

    Raises:
        ValueError: no such page.
    """
    if page is not None and page not in PAGES:
        raise ValueError(f"no page {page!r}; there are {', '.join(PAGES)}")
    makers = {"days": _days, "weather": _weather, "trends": _trends, "table": _table}
    result = Talk()
    texts = []
    for name in PAGES if page is None else (page,):
        result.pages[name], text = makers[name]()
        texts.append(text)
    result.text = "\n\n".join(texts)
    return result


def achieved() -> dict[str, float]:
    """Share of nominal peak that the planner expects of a GPT-3 on each of the talk's machines.

    Fugaku: fp32 at 2.2 GHz, all nodes, 12,288 samples of 2,048 tokens a step. A100: 25,000, bf16, the same batch.
    """
    shape = gpt(12288, 96, 96, 2048)
    found = {}
    for name, devices, stack, precision in (
        ("Fugaku", 158_976, stacks.FUGAKU_2022, "fp32"),
        ("OpenAI A100", 25_000, stacks.MEGATRON_2022, "bf16"),
    ):
        machine = load("fugaku-2.2" if name == "Fugaku" else "a100-80")
        job = Job(shape, machine, stack, 12_288, precision)  # type: ignore[arg-type]
        best = search(job, devices, keep=1)
        rate = model_flops(shape) * job.global_batch / float(best.seconds[0])
        found[name] = rate / (devices * machine.device.peak[job.precision])
    return found


def _days() -> tuple[list[dict[str, Any]], str]:
    """How long it takes to train GPT."""
    shares = achieved()
    lines = [
        "How long it will take to train GPT",
        f"{'':12} {'model':8} {'FLOPs':>7} {'EFLOP/s':>8} {'days at peak':>13} {'talk':>9} {'× talk':>7} {'days':>8} "
        f"{'planner: of peak':>17} {'days':>8}",
    ]
    found = []
    for row in rows("seed_how_long"):
        peak = float(row["tflops_per_unit"]) * 1e12 * int(row["units"])
        days = float(row["train_flops"]) / peak / DAY
        share, times = shares[row["machine"]], float(row["multiplier_to_actual"])
        entry = {
            "machine": row["machine"],
            "model": row["model"],
            "days_at_peak": days,
            "talk": row["time_at_peak_stated"],
        }
        entry |= {"days_talk": days * times, "share": share, "days_planner": days / share}
        found.append(entry)
        lines.append(
            f"{row['machine']:12} {row['model']:8} {float(row['train_flops']):7.0e} {peak / 1e18:8.2f} {days:13.2f} "
            f"{row['time_at_peak_stated']:>9} {times:7.0f} {days * times:8.1f} {share:17.1%} {days / share:8.1f}"
        )
    lines += [
        "Conventions: FLOPs as the talk gives them (speculated for 3.5 and 4). Fugaku: FP32 at 2.2 GHz, 6.76 TFLOP/s ×",
        "158,976 nodes; A100: dense BF16, 312 TFLOP/s × 25,000. × talk: its factor from peak to actual performance (10",
        "and 2). Planner: the share of peak that it finds for a 175B model with the software of 2022 on all devices",
        "(model FLOPs, no recomputation counted); no failures. The talk's 328 days are 323 by its own numbers.",
    ]
    return found, "\n".join(lines)


def _weather() -> tuple[list[dict[str, Any]], str]:
    """The cost of GPT-4 against the 3.5-km weather simulation."""
    gpu_hours = 25_000 * 90 * 24
    node_hours = 131_072 * 14_200 / 3600
    a100, fugaku = load("a100-80").economy, load("fugaku-2.0").economy
    gpu_energy = gpu_hours * (a100.watts or 0) * a100.overhead / 1e9
    node_energy = node_hours * (fugaku.watts or 0) * fugaku.overhead / 1e9
    at_peak = gpu_hours * 3600 * 312e12
    per_token = 6 * 1e12
    found = [
        {"run": "GPT-4", "hours": gpu_hours, "gigawatt_hours": gpu_energy, "flops_at_peak": at_peak},
        {"run": "weather", "hours": node_hours, "gigawatt_hours": node_energy},
    ]
    table = [
        ("", "GPT-4", "weather"),
        ("devices", "25,000 A100", "131,072 A64FX"),
        ("time", "90 days", "14,200 s"),
        ("device-hours", f"{gpu_hours:,.0f}", f"{node_hours:,.0f}"),
        ("energy, GWh", f"{gpu_energy:.2f}", f"{node_energy:.3f}"),
        ("FLOPs per item", f"{per_token:.0e} per token", "9e+07 per grid point"),
    ]
    lines = ["Cost of GPT-4 against a 3.5-km global weather simulation (1,024-member ensemble, SC20)"]
    lines += [f"{left:16} {middle:>20} {right:>22}" for left, middle, right in table]
    lines += [
        "Conventions: device-hours are devices × time. The talk prints 33,230 CPU-hours for the simulation; 131,072",
        f"nodes × 14,200 s are {node_hours:,.0f} node-hours, {node_hours / 33_230:.1f} times as many. "
        "Energy: watts × overhead of the site,",
        f"from the machine files (400 W × 1.1; {fugaku.watts:.0f} W × {fugaku.overhead}). 54 million GPU-hours are "
        f"{at_peak:.2g} FLOPs at BF16 peak: the",
        f"3e25 of the other page are {3e25 / at_peak:.0%} of that.",
        f"But 6 × 1e12 parameters × 450e9 tokens are {per_token * 450e9:.1e}, "
        f"{3e25 / (per_token * 450e9):.0f} times less than 3e25: two pages, two runs.",
        f"GPT-4's training is {gpu_hours / node_hours:,.0f} such simulations by device-hours, "
        f"{gpu_energy / node_energy:,.0f} by energy.",
    ]
    text = "\n".join(lines)
    return found, text


def _trends() -> tuple[list[dict[str, Any]], str]:
    """Compute trends and compute-optimal sizes."""
    found: list[dict[str, Any]] = []
    lines = ["Compute trends"]
    for name, power, years in (("Moore's law, 1970–2020", 7, 50), ("deep learning, 2010–2022", 10, 12)):
        doubling = 12 * years / (power * log2(10))
        found.append({"trend": name, "factor": 10.0**power, "years": years, "doubling_months": doubling})
        lines.append(
            f"{name:26} 10^{power} in {years} years: × {10 ** (power / years):.3g} a year, "
            f"doubles in {doubling:.1f} months"
        )
    lines.append(f"{'':8} {'FLOPs':>7} {'parameters':>11} {'tokens':>8}   compute-optimal")
    for name, flops in (("GPT-3", 3e23), ("GPT-3.5", 3e24), ("GPT-4", 3e25)):
        size = sqrt(flops / 120)
        found.append({"model": name, "flops": flops, "parameters": size, "tokens": 20 * size})
        lines.append(f"{name:8} {flops:7.0e} {size / 1e9:10.0f}B {20 * size / 1e12:7.2f}T")
    lines += [
        "Conventions: doubling time = years / log2(factor). Compute-optimal: C = 6 N D and D = 20 N (Hoffmann et al.,",
        "arXiv 2203.15556), so N = √(C / 120). GPT-3 itself had 175B parameters and 0.3T tokens: 6 N D = 3.15e23.",
    ]
    return found, "\n".join(lines)


def _table() -> tuple[list[dict[str, Any]], str]:
    """FLOP/s achieved on the 1.3B model, and its step predicted."""
    machine = load("fugaku-2.0")
    shape = gpt(2048, 24, 32, 1024, 50304)
    peak = machine.device.peak["fp32"]
    lines = [
        "FLOP/s achieved on the 1.3B model (global batch 1,024, sequence 1,024)",
        f"{'CPUs':>5} {'DP':>5} {'MP':>3} {'talk TFLOP/s':>13} {'predicted':>10} {'error':>7} {'% peak':>7} "
        f"{'PFLOP/s':>8} {'A100s':>6} {'s/step':>8}  where the time goes",
    ]
    found = []
    for row, case in zip(rows("seed_fugaku_1p3B"), published.cases("seed_fugaku_1p3B"), strict=True):
        cost = costs.step(case.job, case.layout)
        cpus, seconds = int(row["n_cpus"]), float(cost.seconds[0])
        rate = float(row["tflops_per_cpu"]) * case.seconds / seconds
        parts = sorted(((float(value[0]) / seconds, key) for key, value in cost.parts.items()), reverse=True)[:4]
        entry = {"cpus": cpus, "talk": float(row["tflops_per_cpu"]), "predicted": rate, "seconds": seconds}
        entry |= {"peak_share": rate * 1e12 / peak, "pflops": rate * cpus / 1024, "a100s": rate * cpus / 1.024 / 137}
        found.append(entry)
        where = ", ".join(f"{key} {share:.0%}" for share, key in parts)
        lines.append(
            f"{cpus:5d} {row['dp']:>5} {row['mp']:>3} {entry['talk']:13.2f} {rate:10.2f} "
            f"{rate / entry['talk'] - 1:+7.1%} {entry['peak_share']:7.1%} {entry['pflops']:8.3f} "
            f"{entry['a100s']:6.2f} {seconds:8.1f}  {where}"
        )
    alone = candidates(recompute="full")
    executed = hardware_flops(shape, "full") / model_flops(shape)
    lines += [
        "Conventions: TFLOP/s per CPU as the talk counts: 24 f B s L h² (1 + s/6h + V/16Lh), f = 3; f = 4 in the row",
        f"of one CPU, which recomputes ({executed:.2f} × the model's FLOPs). % of 6.144 TFLOP/s (2.0 GHz), though the",
        "talk's peak slide has 6.76 (2.2 GHz). PFLOP/s divide by 1,024; A100s are those PFLOP/s per 137 TFLOP/s.",
        f"Memory of the one CPU: {_gigabytes(shape, alone):.1f} of 32 GB.",
    ]
    return found, "\n".join(lines)


def _gigabytes(shape: Shape, layout: Candidates) -> float:
    """What the planner says a layout needs on Fugaku."""
    job = Job(shape, load("fugaku-2.0"), stacks.FUGAKU_2022, 1024, "fp32")
    return float(memory(job, layout).total[0]) / 1e9
