"""`tozan plan`: the best layouts of a model on a machine, and what training with them takes.

Answers "how long on these nodes", or, turned round, "how many nodes for this deadline or budget".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from pathlib import Path
from typing import Any

import numpy as np

from tozan.amounts import days, many
from tozan.errors import Problem, UserError
from tozan.models.arithmetic import Shape, model_flops, parameters
from tozan.planner import costs, export, show, stacks
from tozan.planner.candidates import OFFLOAD, RECOMPUTE, Candidates
from tozan.planner.intervals import bounds
from tozan.planner.layer import Job
from tozan.planner.losses import Losses, losses
from tozan.planner.machine import Machine, Precision, load
from tozan.planner.memory import by_block, memory
from tozan.planner.search import Found, Options, search
from tozan.planner.sizes import default_batch, find_shape

DAY = 86400.0
TIGHT = 0.9
"""Share of a device's memory above which a plan warns."""


@dataclass(frozen=True)
class Choice:
    """One layout with its price.

    Attributes:
        layout: its properties by name, as in `Candidates`, with `recompute` and `offload` as words.
        devices: devices it uses.
        seconds: of one step.
        low: lower end of the 80% interval of `seconds`.
        high: upper end.
        parts: seconds of a step by what they are spent on.
        memory: bytes on the fullest device by category.
        flops: achieved model FLOP/s of one device.
        peak_share: that over the nominal peak at the run's precision (MFU).
        days: whole run, failures and checkpoints included.
        losses: what of them failures and checkpoints take.
        megawatt_hours: energy, where the machine file says what a device draws.
        cost: of the whole run, in the machine's `economy.currency`, where its file has a price.
    """

    layout: dict[str, Any]
    devices: int
    seconds: float
    low: float
    high: float
    parts: dict[str, float]
    memory: dict[str, float]
    flops: float
    peak_share: float
    days: float
    losses: Losses
    megawatt_hours: float | None
    cost: float | None


@dataclass
class Plan:
    """What `plan` found.

    Attributes:
        model: name or path as asked.
        shape: its sizes.
        machine: what it is planned for.
        nodes: nodes given, or found for a deadline or budget.
        tokens: tokens of the whole run.
        global_batch: samples of one step.
        precision: compute type.
        stack: trainer that is supposed to run it.
        steps: optimizer steps.
        choices: best first; if nothing fits in memory, those nearest to fitting.
        fits: whether `choices` fit.
        tried: layouts priced.
        elapsed: seconds the search took.
        advice: sentences: why the runner-up lost, what to change if nothing fits, what the config cannot say.
        blocks: memory by block of the best choice.
        curves: for sweeps, by kind (`strong`, `weak`), one entry per number of nodes.
        text: the answer for a terminal.
    """

    model: str
    shape: Shape
    machine: Machine
    nodes: int
    tokens: float
    global_batch: int
    precision: Precision
    stack: str
    steps: int
    choices: list[Choice]
    fits: bool
    tried: int
    elapsed: float
    advice: list[str] = field(default_factory=list)
    blocks: list[dict[str, float]] = field(default_factory=list)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    text: str = ""

    def config(self) -> str:
        """A config for `tozan train`, with what it cannot say as comments."""
        return show.config(self)

    def launch(self) -> str:
        """A script that starts it."""
        return show.launch(self)

    @property
    def job(self) -> Job:
        """What was priced, apart from layouts."""
        return Job(self.shape, self.machine, stacks.STACKS[self.stack], self.global_batch, self.precision)

    def data(self) -> dict[str, Any]:
        """All of it as JSON can hold it: what `plan.json` has."""
        return export.data(self, self.job)

    def write(self, folder: Path) -> None:
        """Write `plan.json` (which `tozan report` draws), `plan.toml` and `launch.sh` into `folder`.

        Raises:
            UserError: a place that cannot be written to.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "plan.json").write_text(export.text(self, self.job), encoding="utf-8")
            (folder / "plan.toml").write_text(self.config(), encoding="utf-8")
            (folder / "launch.sh").write_text(self.launch(), encoding="utf-8")
        except OSError as error:
            raise UserError(Problem(str(error.filename), f"cannot be written: {error.strerror}")) from None


def plan(
    model: str,
    machine: str,
    nodes: int | None = None,
    tokens: float | None = None,
    *,
    global_batch: int | None = None,
    precision: Precision | None = None,
    stack: str = "tozan",
    deadline: float | None = None,
    budget: float | None = None,
    sweep: str | None = None,
    options: Options | None = None,
) -> Plan:
    """Find the best layouts.

    Args:
        model: a preset, the path of a config, or a size such as `175B` (a GPT of about that many parameters).
        machine: a machine that tozan ships, or the path of a machine file.
        nodes: nodes to use; may be left out with `deadline` or `budget`. Default then: all.
        tokens: tokens to train on; default 20 per parameter (Hoffmann et al., arXiv 2203.15556).
        global_batch: samples of a step; default 0.5, 1 or 4 Mi tokens for models under 1B, 10B or larger.
        precision: compute type; default the fastest of the machine that trains well: bf16 unless no faster than fp32.
        stack: the trainer, one of `stacks.STACKS`.
        deadline: days; finds the fewest nodes that meet it.
        budget: money; finds the nodes that finish soonest within it.
        sweep: `strong` (same batch), `weak` (batch grows with the nodes) or `both`: also price a row of node counts.
        options: what the search may use.

    Raises:
        UserError: anything asked that does not exist or cannot be, all at once.
    """
    found_machine = load(machine)
    shape = find_shape(model)
    _check(found_machine, nodes, tokens, stack, deadline, budget, sweep)
    peak = found_machine.device.peak
    precision = precision or ("bf16" if peak["bf16"] > peak["fp32"] else "fp32")
    tokens = tokens or 20.0 * parameters(shape)
    batch = global_batch or default_batch(shape)
    job = Job(shape, found_machine, stacks.STACKS[stack], batch, precision)
    result = Plan(model, shape, found_machine, 0, tokens, batch, precision, stack, 0, [], True, 0, 0.0)
    if tokens < (step := batch * shape.sequence):
        fix = "tokens are counted one by one (300e9), not in billions"
        raise UserError(Problem("--tokens", f"{tokens:g} is less than one step, {step:,} tokens", fix))
    result.steps = int(-(-tokens // step))
    if nodes is None and (deadline is not None or budget is not None):
        nodes = _turned_round(result, job, deadline, budget, options)
    _fill(result, job, nodes or found_machine.nodes, options)
    result.advice[:0] = _missed(result, deadline, budget)
    for kind in ("strong", "weak") if sweep == "both" else filter(None, [sweep]):
        result.curves[kind] = scaling(result, job, kind, options)
    result.text = show.text(result)
    return result


def scaling(result: Plan, job: Job, kind: str, options: Options | None = None) -> list[dict[str, float]]:
    """Best step time for a row of node counts, by factors of two up to the plan's own.

    Args:
        result: the plan whose nodes end the row.
        job: its job.
        kind: `strong` keeps the batch; `weak` gives each node count its share of it.
        options: what the search may use.
    """
    rows: list[dict[str, float]] = []
    for nodes in _powers(result.nodes):
        batch = job.global_batch if kind == "strong" else max(1, round(job.global_batch * nodes / result.nodes))
        one = Job(job.shape, job.machine, job.stack, batch, job.precision)
        found = search(one, nodes * job.machine.node.devices, options, keep=1)
        if not found.fitting:
            continue
        seconds, devices = float(found.seconds[0]), int(found.candidates.ranks[0])
        rate = model_flops(job.shape) * batch / seconds
        row = {"nodes": nodes, "seconds": seconds, "global_batch": batch, "flops_per_device": rate / devices}
        rows.append({key: float(value) for key, value in row.items()} | {"flops": rate})
    for row in rows:
        row["efficiency"] = row["flops_per_device"] / rows[0]["flops_per_device"]
    return rows


def _check(
    machine: Machine,
    nodes: int | None,
    tokens: float | None,
    stack: str,
    deadline: float | None,
    budget: float | None,
    sweep: str | None,
) -> None:
    """Refuse what cannot be, all at once."""
    problems = []
    if nodes is not None and not 1 <= nodes <= machine.nodes:
        problems.append(Problem("--nodes", f"{nodes} is outside 1 … {machine.nodes}, the nodes of {machine.name}"))
    if stack not in stacks.STACKS:
        problems.append(Problem("--stack", f"no stack is called {stack!r}", f"one of {', '.join(stacks.STACKS)}"))
    if sweep not in (None, "strong", "weak", "both"):
        problems.append(Problem("--sweep", f"{sweep!r} is no kind of scaling", "strong, weak or both"))
    for name, value in (("--tokens", tokens), ("--deadline", deadline), ("--budget", budget)):
        if value is not None and not 0 < value < inf:
            problems.append(Problem(name, f"{value} is no number above 0"))
    if budget is not None and machine.economy.price is None:
        problems.append(Problem("--budget", f"{machine.name} has no price", "set economy.price in the machine file"))
    if problems:
        raise UserError(*problems)


def _powers(limit: int) -> list[int]:
    """1, 2, 4 … and the limit itself."""
    return sorted({2**k for k in range(limit.bit_length()) if 2**k <= limit} | {limit})


def _turned_round(result: Plan, job: Job, deadline: float | None, budget: float | None, options: Options | None) -> int:
    """The fewest nodes that meet a deadline (and the budget), or the soonest finish within the budget."""
    best: tuple[float, int] | None = None
    rows = []
    for nodes in _powers(job.machine.nodes):
        found = search(job, nodes * job.machine.node.devices, options, keep=1)
        if not found.fitting:
            continue
        choice = _choice(result, job, found, 0)
        rows.append((nodes, choice))
        if budget is not None and (choice.cost is None or choice.cost > budget):
            continue
        if deadline is not None and choice.days > deadline:
            continue
        key = float(nodes) if deadline is not None else choice.days
        if best is None or key < best[0]:
            best = (key, nodes)
    if best is None:
        raise UserError(_out_of_reach(result, job, rows, deadline, budget))
    if deadline is not None and best[1] > 1:
        return _narrow(result, job, int(best[1]), deadline, budget, options)
    return best[1]


def _out_of_reach(
    result: Plan, job: Job, rows: list[tuple[int, Choice]], deadline: float | None, budget: float | None
) -> Problem:
    """What a deadline or budget asks that no number of nodes gives, with what comes nearest."""
    where = " and ".join(
        f"{flag} {value:g}" for flag, value in (("--deadline", deadline), ("--budget", budget)) if value is not None
    )
    if not rows:
        nodes, machine = job.machine.nodes, job.machine
        what = f"{result.model} does not fit in memory on any number of the {nodes:,} nodes of {machine.name}"
        return Problem(where, what, f"see what is missing: tozan plan {result.model} --nodes {nodes}")

    def told(pair: tuple[int, Choice]) -> str:
        return f"{many(pair[0], 'node')}: {days(pair[1].days)}{_money(result, pair[1])}"

    soonest = min(rows, key=lambda pair: pair[1].days)
    nearest = [f"soonest is {told(soonest)}"]
    if budget is not None:
        cheapest = min(rows, key=lambda pair: pair[1].cost or 0.0)
        nearest.append(f"cheapest is {told(cheapest)}")
    late = deadline is not None and soonest[1].days > deadline
    fixes = [f"at most {result.tokens * deadline / soonest[1].days:.3g} tokens"] if late and deadline else []
    in_time = [soonest] if late else [pair for pair in rows if deadline is None or pair[1].days <= deadline]
    costs = [choice.cost for _, choice in in_time if choice.cost is not None]
    fixes += [f"a budget of {ceil(min(costs)):,}"] if budget is not None and costs else []
    larger = "a larger --global-batch, which more nodes can share" if late else "a smaller model"
    return Problem(where, f"no number of nodes does it: {'; '.join(nearest)}", f"try {', '.join([*fixes, larger])}")


def _narrow(result: Plan, job: Job, nodes: int, deadline: float, budget: float | None, options: Options | None) -> int:
    """Between half of `nodes` and `nodes`, the fewest of eight steps that still meet the deadline."""
    for count in np.unique(np.linspace(nodes // 2, nodes, 9).astype(int))[1:-1]:
        found = search(job, int(count) * job.machine.node.devices, options, keep=1)
        if found.fitting:
            choice = _choice(result, job, found, 0)
            if choice.days <= deadline and (budget is None or (choice.cost or 0) <= budget):
                return int(count)
    return nodes


def _missed(result: Plan, deadline: float | None, budget: float | None) -> list[str]:
    """What of a deadline or budget the best layout misses on the nodes that were asked for."""
    best = result.choices[0]
    missed = []
    if deadline is not None and best.days > deadline:
        missed.append(f"Misses the deadline of {deadline:g} days: the best takes {days(best.days)}.")
    if budget is not None and best.cost is not None and best.cost > budget:
        missed.append(f"Exceeds the budget of {budget:,.0f}: the best costs {_money(result, best)[2:]}.")
    return [f"{' '.join(missed)} Leave --nodes out to find how many do."] if missed else []


def _money(result: Plan, choice: Choice) -> str:
    """What a choice costs, as words."""
    return "" if choice.cost is None else f", {choice.cost:,.0f} {result.machine.economy.currency}"


def _fill(result: Plan, job: Job, nodes: int, options: Options | None) -> None:
    """Search on `nodes` and put the answer into `result`."""
    found = search(job, nodes * job.machine.node.devices, options, keep=400)
    if not found.tried:
        raise UserError(
            Problem(
                "--nodes",
                f"no layout of {result.model} uses {many(nodes, 'node')}",
                "fewer nodes or a larger global batch",
            )
        )
    result.nodes, result.tried, result.elapsed, result.fits = nodes, found.tried, found.elapsed, found.fitting > 0
    result.choices = [_choice(result, job, found, index) for index in _different(found.candidates)]
    result.blocks = by_block(job, found.candidates, 0)
    result.advice = _advice(result, job)


def _different(c: Candidates, count: int = 5) -> Sequence[int]:
    """The best candidate of each of the first few meshes."""
    seen: dict[tuple[int, ...], int] = {}
    for index, one in enumerate(c):
        seen.setdefault(tuple(one[name] for name in ("pp", "dp", "cp", "tp", "grid", "depth")), index)
        if len(seen) == count:
            break
    return list(seen.values())


def _choice(result: Plan, job: Job, found: Found, index: int) -> Choice:
    """The price of one found candidate."""
    c = found.candidates.pick([index])
    cost, held = costs.step(job, c), memory(job, c)
    seconds, devices = float(cost.seconds[0]), int(c.ranks[0])
    layout: dict[str, Any] = c.one(0)
    layout["recompute"], layout["offload"] = RECOMPUTE[layout["recompute"]], OFFLOAD[layout["offload"]]
    flops = model_flops(job.shape) * job.global_batch / seconds / devices
    lost = losses(job.machine, job.shape, devices)
    days = result.steps * seconds * (1 + lost.share) / DAY
    economy = job.machine.economy
    energy = economy.watts and economy.watts * economy.overhead * devices * days * 24 / 1e6
    low, high = bounds(job.machine, seconds, measured=job.stack.measured)
    return Choice(
        layout,
        devices,
        seconds,
        low,
        high,
        {name: float(value[0]) for name, value in cost.parts.items()},
        {name: float(np.broadcast_to(value, 1)[0]) for name, value in held.parts.items()},
        flops,
        flops / job.machine.device.peak[job.precision],
        days,
        lost,
        energy,
        economy.price and economy.price * devices * days * 24,
    )


def _advice(result: Plan, job: Job) -> list[str]:
    """Why the runner-up lost; what to do if nothing fits."""
    best = result.choices[0]
    if not result.fits:
        need, have = sum(best.memory.values()) / 1e9, job.machine.device.memory / 1e9
        largest = max((k for k in best.memory if k != "reserve"), key=lambda k: best.memory[k])
        enough = (n for n in _powers(job.machine.nodes) if n > result.nodes)
        nodes = next((n for n in enough if search(job, n * job.machine.node.devices, keep=1).fitting), None)
        change = f"{nodes:,} nodes are enough" if nodes else f"no number of nodes of {job.machine.name} is enough"
        smaller = "" if nodes else ", so take a smaller model or a machine with more memory per device"
        return [
            f"Nothing fits: the nearest layout needs {need:.1f} of {have:.1f} GB per device, most of it {largest} "
            f"({best.memory[largest] / 1e9:.1f} GB); {change}{smaller}."
        ]
    advice = []
    if len(result.choices) > 1:
        other = result.choices[1]
        gap = other.seconds - best.seconds
        changes = sorted(((other.parts[k] - best.parts[k], k) for k in best.parts), reverse=True)
        worse = [f"{delta:+.3g} s {name}" for delta, name in changes[:2] if delta > 0.02 * abs(gap)]
        better = [f"{delta:+.3g} s {name}" for delta, name in changes[-1:] if delta < -0.02 * abs(gap)]
        why = f"loses {gap:.3g} s a step: {', '.join(worse + better)}" if worse + better else "takes as long"
        advice.append(f"The runner-up ({show.name(other)}) {why}.")
    held = sum(best.memory.values()) / job.machine.device.memory
    if held > TIGHT:
        advice.append(f"Tight: the first fills {held:.0%} of a device's memory, and forecasts of runs were off by 9%.")
    used, given = best.devices, result.nodes * job.machine.node.devices
    if used < given:
        advice.append(f"It uses {used:,} of {given:,} devices: no layout that divides evenly does better with more.")
    return advice
