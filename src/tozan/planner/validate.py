"""`tozan plan validate`: every published table, predicted, beside two baselines.

The baselines: the best tool whose error on that table is published (or was found by re-running it), and one constant,
the share of peak that fits the table's own rows best. A planner that does not beat the second explains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np

from tozan.errors import Problem, UserError
from tozan.models.arithmetic import parameters
from tozan.planner import collectives, costs, published, stacks
from tozan.planner.candidates import Floats, candidates
from tozan.planner.intervals import bounds
from tozan.planner.layer import Job
from tozan.planner.machine import Machine, load
from tozan.planner.memory import memory
from tozan.planner.published import Case, gpt, rows

BEST_TOOL: dict[str, tuple[float, str]] = {
    "korthikanti_table5": (0.0365, "Calculon"),
    "megatron_sc21_table1": (0.10, "Calculon"),
    "vtrain_multi": (0.147, "vTrain"),
    "vtrain_single": (0.084, "vTrain, GPU profile"),
}
"""Mean absolute error of the best tool known on a table: vTrain as published (it profiles each kernel on the GPU),
Calculon as re-run on tables other than its own."""

BARS: dict[str, float] = {
    "seed_fugaku_1p3B": 0.04,
    "megatron_sc21_table1": 0.04,
    "korthikanti_table5": 0.03,
    "megatron_readme_h100_weak": 0.04,
    "vtrain_multi": 0.09,
    "vtrain_single": 0.12,
    "memory: parameters and optimizer": 0.03,
    "memory: activations": 0.02,
}
"""What the project asks of the planner."""


Triple = tuple[float, float, str]
"""Predicted, measured, use."""


@dataclass(frozen=True)
class Line:
    """One row of the report.

    Attributes:
        table: which table, or what of it.
        count: rows compared.
        error: mean absolute error.
        worst: largest absolute error.
        bias: mean error; positive if predicted too long (or too much).
        tool: error of the best published tool and its name, if there is one.
        constant: error of one constant fitted to the same rows, where that makes sense.
        public_error: mean absolute error over the rows that nothing was fitted to (`use` = public), if there are any.
        covered: share of public rows inside the 80% interval.
    """

    table: str
    count: int
    error: float
    worst: float
    bias: float
    tool: tuple[float, str] | None = None
    constant: float | None = None
    public_error: float | None = None
    covered: float | None = None


@dataclass
class Report:
    """What `validate` found; `lines` are tables, the rest is over all of them."""

    lines: list[Line] = field(default_factory=list)
    coverage: dict[str, tuple[float, int]] = field(default_factory=dict)
    kendall: float = 0.0
    kendall_jobs: float = 0.0
    regret: float = 0.0
    groups: int = 0
    notes: list[str] = field(default_factory=list)
    text: str = ""


def validate(rows_too: bool = False, folder: Path | None = None) -> Report:
    """Predict every published table.

    Args:
        rows_too: print every row as well.
        folder: of other rows of these tables, to be predicted in place of tozan's own: CSV files with the same names
            and columns, as many of them as there are.

    Raises:
        UserError: no file of the folder is one of these tables, or one cannot be read.
    """
    report = Report()
    machines = {
        name: load(name) for name in ("a100-80", "a100-40", "h100-80", "v100-32", "fugaku-2.0", "tpu-v4", "tpu-v5e")
    }
    tables = published.every(lambda name: machines[name], folder)
    if not any(tables.values()) and not rows("korthikanti_memory", folder):
        fix = f"files such as {next(iter(published.READERS))}.csv"
        raise UserError(Problem(f"--tables {folder}", "holds no row of any table that tozan has", fix))
    details: list[str] = []
    inside: dict[str, list[bool]] = {"calibration": [], "public": []}
    for table, cases in tables.items():
        if cases:
            report.lines.append(_line(table, cases))
        for case in cases:
            seconds = case.predict()
            low, high = bounds(case.job.machine, seconds)
            inside.setdefault(case.use, []).append(low <= case.seconds <= high)
            details.append(
                f"{table:34} {case.label:40} {case.seconds:11.3f} {seconds:11.3f} {seconds / case.seconds - 1:+7.1%}"
            )
    report.lines += _memory_lines(machines["a100-80"], folder)
    if folder is None:
        report.lines.append(_whole_memory_line(tables))
        report.lines += [_collective_line(machines), _cluster_line(machines["h100-80"])]
        report.lines += [_energy_line(), _palm_line(machines), _scalar_line(machines["a100-80"])]
    report.coverage = {use: (fmean(found), len(found)) for use, found in inside.items() if found}
    ranked = [case for table in ("vtrain_multi", "vtrain_single", "bigscience_bloom_tuning") for case in tables[table]]
    report.kendall, report.kendall_jobs, report.regret, report.groups = _ranking(ranked)
    report.notes = _notes(tables) if folder is None else []
    report.text = _text(report, details if rows_too else [])
    return report


def _line(table: str, cases: list[Case]) -> Line:
    """Compare one table of step times."""
    errors = np.array([case.predict() / case.seconds - 1 for case in cases])
    public = [error for error, case in zip(errors, cases, strict=True) if case.use == "public"]
    covered = [
        low <= case.seconds <= high
        for case in cases
        if case.use == "public"
        for low, high in [bounds(case.job.machine, case.predict())]
    ]
    return Line(
        table,
        len(cases),
        float(np.mean(np.abs(errors))),
        float(np.max(np.abs(errors))),
        float(np.mean(errors)),
        BEST_TOOL.get(table),
        _constant(np.array([case.floor / case.seconds for case in cases])),
        float(np.mean(np.abs(public))) if public else None,
        fmean(covered) if covered else None,
    )


def _constant(ratios: Floats) -> float:
    """Mean absolute error of the best single factor on `ratios`; it is the inverse of one of them."""
    return float(min(np.mean(np.abs(ratios / ratio - 1)) for ratio in ratios))


def _compare(table: str, found: list[Triple], constant: bool = True) -> Line:
    """Compare numbers of any kind."""
    ratios = np.array([predicted / measured for predicted, measured, _ in found])
    public = [abs(ratio - 1) for ratio, (_, _, use) in zip(ratios, found, strict=True) if use == "public"]
    return Line(
        table,
        len(ratios),
        float(np.mean(np.abs(ratios - 1))),
        float(np.max(np.abs(ratios - 1))),
        float(np.mean(ratios - 1)),
        constant=_constant(ratios) if constant else None,
        public_error=float(np.mean(public)) if public else None,
    )


def _memory_lines(machine: Machine, folder: Path | None) -> list[Line]:
    """Korthikanti's figures 1 and 7. Their state is that of the blocks alone, without embeddings: so is ours here."""
    sizes = {row["model"]: row for row in rows("korthikanti_table5")}
    modes = {"none": (0, "none"), "seq": (1, "none"), "selective": (0, "selective")}
    modes |= {"seq+selective": (1, "selective"), "full": (0, "full")}
    state: list[Triple] = []
    kept: list[Triple] = []
    for row in rows("korthikanti_memory", folder):
        size = {key: int(sizes[row["model"]][key]) for key in ("hidden", "layers", "heads", "tp", "pp", "virtual_pp")}
        batch, micro = (int(sizes[row["model"]][key]) for key in ("global_batch", "micro_batch"))
        job = Job(gpt(size["hidden"], size["layers"], size["heads"], 2048), machine, stacks.MEGATRON_2022, batch)

        def price(mode: str, job: Job = job, size: dict[str, int] = size, micro: int = micro) -> tuple[float, float]:
            parallel, recompute = modes[mode]
            layout = candidates(
                tp=size["tp"],
                pp=size["pp"],
                chunks=size["virtual_pp"],
                micro_batch=micro,
                sequence_parallel=parallel,
                recompute=recompute,
            )
            found = memory(job, layout).parts
            blocks, ends = costs.stage_parameters(job, layout)
            fixed = sum(float(found[key][0]) for key in ("parameters", "gradients", "optimizer"))
            return fixed * float(blocks[0] / (blocks[0] + ends[0])), float(found["activations"][0])

        fixed, activations = price(row["mode"])
        if row["figure"] == "fig1":
            state.append((fixed / 2**30, float(row["params_optim_gib"]), row["use"]))
            kept.append((activations / 2**30, float(row["activation_gib"]), row["use"]))
        elif row["mode"] != "none":
            kept.append((100 * activations / price("none")[1], float(row["activation_pct_of_none"]), row["use"]))
    return [
        _compare(name, found, constant=False)
        for name, found in (("memory: parameters and optimizer", state), ("memory: activations", kept))
        if found
    ]


def _whole_memory_line(tables: dict[str, list[Case]]) -> Line:
    """What runs reported per device: BLOOM's tuning and nanotron's best layouts; allocators and all."""
    found = []
    for table, column in (("bigscience_bloom_tuning", "mem_gb"), ("nanotron_best_configs", "peak_mem_gb")):
        for row, case in zip(rows(table), tables[table], strict=True):
            if row[column]:
                held = float(np.broadcast_to(memory(case.job, case.layout).total, 1)[0]) / 1e9
                found.append((held, float(row[column]), row["use"]))
    return _compare("memory: whole device (BLOOM, nanotron)", found)


def _collective_line(machines: dict[str, Machine]) -> Line:
    """NCCL all-reduce of 2 to 8 GPUs in one node; the node files' three numbers are of these rows and of training."""
    found = []
    for row in rows("vtrain_nccl_allreduce_lut"):
        if row["gpu"] != "a100":
            continue  # that V100 node has a hybrid cube mesh, whose rate depends on which GPUs: no machine file of ours
        seconds = float(collectives.all_reduce(machines["a100-80"], int(row["bytes"]), int(row["n_gpus"]), 1))
        found.append((seconds * 1e6, float(row["time_us"]), row["use"]))
    return _compare("vtrain_nccl_allreduce_lut (A100)", found)


SHARED_CONGESTION = 0.75
"""Loss of bandwidth per doubling of nodes on the cluster of tables/ultrascale_playbook.csv, fitted to its rows; a
dedicated fabric, as in the machine files, loses 0.02."""


def _cluster_line(machine: Machine) -> Line:
    """Bus bandwidth on a shared cluster: means of a wide spread, 12.5 to 177 GB/s at 64 nodes."""
    shared = machine.changed(network={"congestion": SHARED_CONGESTION})
    found = []
    for row in rows("ultrascale_playbook"):
        nodes = int(row["value_of_axis"])
        found.append((float(collectives.bandwidth(shared, nodes * 8, 1)) / 1e9, float(row["value"]), row["use"]))
    return _compare("ultrascale_playbook (bus bandwidth)", found)


def _energy_line() -> Line:
    """LLaMA's energy: GPU-hours × 400 W × PUE 1.1, the convention of its table 15."""
    found = []
    for row in rows("llama1_energy"):
        predicted = float(row["gpu_hours"]) * float(row["gpu_power_w"]) * float(row["pue"]) / 1e6
        found.append((predicted, float(row["mwh"]), row["use"]))
    return _compare("llama1_energy (MWh from GPU-hours)", found, constant=False)


def _palm_line(machines: dict[str, Machine]) -> Line:
    """PaLM's table of MFU: layouts are not said; only the row of MT-NLG on A100 can be priced without guesses."""
    row = next(row for row in rows("palm_mfu") if row["model"].startswith("Megatron"))
    case = next(case for case in published.cases("mtnlg_530b", lambda name: machines[name]) if "2240" in case.label)
    mfu = 100 * case.floor / case.predict()
    return _compare("palm_mfu (Megatron-Turing)", [(mfu, float(row["mfu_pct"]), row["use"])], constant=False)


def _scalar_line(machine: Machine) -> Line:
    """SC21's days to train and fused operations, where model and layout are said."""
    found = []
    for row in rows("megatron_sc21_scalars"):
        value = float(row["value"])
        if row["quantity"] == "days_to_train":
            large = row["config"].startswith("1T")
            shape = gpt(25600, 128, 160, 2048) if large else gpt(12288, 96, 96, 2048)
            layout = {"tp": 8, "pp": 64, "dp": 6} if large else {"tp": 8, "pp": 12, "dp": 10, "micro_batch": 1}
            job = Job(shape, machine, stacks.MEGATRON_2021, 3072 if large else 1540)
            tokens, devices = (450e9, 3072) if large else (300e9, 1024)
            priced = candidates(**layout, recompute="full")
            seconds = float(costs.step(job, priced).seconds[0]) * int(priced.ranks[0]) / devices
            found.append((tokens / (job.global_batch * 2048) * seconds / 86400, value, row["use"]))
        elif row["quantity"] == "checkpoint_size":
            # Parameters in 16 bits and optimizer state in 32, 14 bytes each.
            found.append((14 * parameters(gpt(25600, 128, 160, 2048)) / 1e12, value, row["use"]))
    return _compare("megatron_sc21_scalars (days, checkpoint)", found, constant=False)


def _ranking(cases: list[Case]) -> tuple[float, float, float, int]:
    """Kendall's τ of layouts of one job, over all pairs and as the mean over jobs; mean regret; number of jobs."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(f"{case.table} {case.group}", []).append(case)
    agree = pairs = 0
    taus, regrets = [], []
    for members in groups.values():
        if len(members) < 3:
            continue
        predicted = [case.predict() for case in members]
        signs = [
            int(np.sign((predicted[i] - predicted[j]) * (members[i].seconds - members[j].seconds)))
            for i, j in combinations(range(len(members)), 2)
        ]
        agree, pairs = agree + sum(signs), pairs + len(signs)
        taus.append(fmean(signs))
        chosen = members[int(np.argmin(predicted))].seconds
        regrets.append(chosen / min(case.seconds for case in members) - 1)
    if not taus:
        return 0.0, 0.0, 0.0, 0
    return agree / pairs, fmean(taus), fmean(regrets), len(regrets)


def _notes(tables: dict[str, list[Case]]) -> list[str]:
    """What the numbers leave out, and whether anything known to have run out of memory is said to fit."""
    machine = load("a100-80")
    job = Job(gpt(20480, 105, 128, 2048), machine, stacks.ZERO_2021, 2240)
    layout = candidates(dp=560, micro_batch=4, zero=3, recompute="full")
    fits = bool(memory(job, layout).fits(job)[0])
    ran = [
        bool(memory(case.job, case.layout).fits(case.job).any())
        for table in ("megatron_sc21_table1", "korthikanti_table5", "vtrain_multi", "vtrain_single", "mtnlg_530b")
        for case in tables[table]
    ]
    return [
        "530B with ZeRO-3 on 560 A100-80GB ran out of memory; the planner says that it "
        f"{'fits' if fits else 'does not fit'}.",
        f"Of {len(ran)} layouts that did run, the planner says that {sum(ran)} fit.",
        "Not compared: float8 rows of torchtitan, offload rows of DeepSpeed (a V100 host of unknown speed), rows of "
        "palm_mfu without a layout, bisection and file-system rows of megatron_sc21_scalars.",
    ]


def _text(report: Report, details: list[str]) -> str:
    """The report as plain text."""
    head = f"{'table':42} {'rows':>4} {'error':>7} {'worst':>7} {'bias':>7} {'bar':>5}      "
    head += f"{'constant':>8} {'public':>7}  best tool"
    lines = [head, "-" * len(head)]
    for line in report.lines:
        bar = BARS.get(line.table)
        met = "" if bar is None else "met" if line.error <= bar else "no"
        tool = "" if line.tool is None else f"{line.tool[0]:.1%} {line.tool[1]}"
        lines.append(
            f"{line.table:42} {line.count:4d} {line.error:7.1%} {line.worst:7.1%} {line.bias:+7.1%} "
            f"{'' if bar is None else f'{bar:.0%}':>5} {met:4} {_percent(line.constant):>8} "
            f"{_percent(line.public_error):>7}  {tool}"
        )
    lines.append("")
    for use, (share, count) in report.coverage.items():
        lines.append(
            f"80% interval holds {share:.0%} of {count} {use} rows" + (" (bar: 75–85%)" if use == "public" else "")
        )
    ranking = (
        f"rank order of layouts: Kendall τ {report.kendall:.3f} over pairs, {report.kendall_jobs:.3f} as the mean over "
        f"jobs (bar: 0.75); regret of the chosen layout {report.regret:.1%} (bar: 2%); {report.groups} jobs with ≥ 3 "
        "layouts"
    )
    lines += [ranking] * bool(report.groups) + report.notes
    lines.append(
        "error: mean |predicted / measured − 1|. constant: the same for one share of peak fitted to these very rows."
    )
    return "\n".join(lines + (["", *details] if details else []))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
