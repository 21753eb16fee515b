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

from tozan.planner import others, published, stacks
from tozan.planner.candidates import Floats, candidates
from tozan.planner.intervals import bounds
from tozan.planner.layer import Job
from tozan.planner.machine import load
from tozan.planner.memory import memory
from tozan.planner.published import Case, gpt
from tozan.planner.table import check

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
        UserError: no file of the folder is one of these tables, or some cannot be read: every mistake at once.
    """
    report = Report()
    machines = {
        name: load(name) for name in ("a100-80", "a100-40", "h100-80", "v100-32", "fugaku-2.0", "tpu-v4", "tpu-v5e")
    }
    find = machines.__getitem__
    if folder is not None:
        readers = {table: published.each(table, find) for table in published.READERS}
        check(folder, readers | {table: others.each(table, find) for table in others.READERS})
    tables = published.every(find, folder)
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
    for name, found in others.compare(find, tables, folder):
        report.lines.append(_compare(name, found, constant=name not in others.ALONE))
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


def _compare(table: str, found: list[others.Triple], constant: bool) -> Line:
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
