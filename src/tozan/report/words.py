"""Numbers as people read them, and the summary of a run in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tozan.amounts import duration, percent, scaled
from tozan.report.history import Array, History

PRECISIONS = {"bf16": "bf16 (fp32 weights)", "fp16": "fp16 (fp32 weights)", "fp32": "fp32", "fp64": "fp64"}

PHASE_WORDS = {
    "data": "reading samples",
    "forward": "forward",
    "backward": "backward",
    "communication": "adding up gradients",
    "bubble": "pipeline bubble",
    "optimizer": "clip and optimizer",
    "evaluation": "evaluation",
    "checkpoint": "checkpoint",
    "copy": "copying state to a peer",
    "checks": "checks against silent errors",
    "other": "other",
}


def axis_words(axis: str) -> str:
    """A mesh axis as people call it: the three parts of `tp`, where all are joined, are `tp`."""
    return axis.replace("tp_depth+tp_row+tp_col", "tp")


def phase_words(phase: str) -> str:
    """A phase as people call it."""
    if phase.startswith("wait/"):
        return f"waiting for {axis_words(phase[5:])}"
    return PHASE_WORDS.get(phase, phase)


def amount(value: float) -> str:
    """A count in three digits: `798,720`, `10.1 million`, `124 million`, `1.3 billion`."""
    if not math.isfinite(value):
        return "an unknown number of"
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}"


def plain(value: object) -> bool:
    """Whether a value can stand in a table as it is: text or a number."""
    return isinstance(value, str | int | float)


def time_tick(value: float, _: object = None) -> str:
    """Seconds on an axis, in as few characters as will do."""
    if value >= 120:
        return f"{value / 3600:.3g} h" if value >= 7200 else f"{value / 60:.3g} min"
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value else "0"


def middle(values: Array) -> float:
    """The median of the finite values, or NaN when there is none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else float("nan")


@dataclass(frozen=True)
class Tile:
    """One headline number: its name, its value, and a remark under it."""

    name: str
    value: str
    remark: str


def fall(history: History) -> tuple[str, float, float]:
    """Which loss to speak of, and its first and last value (nats per token): held-out if there are two or more."""
    held_out = history.evals["loss"]
    if held_out.size > 1:
        return "held-out loss", float(held_out[0]), float(held_out[-1])
    losses = history.steps["loss"][np.isfinite(history.steps["loss"])]
    if not losses.size:
        return "training loss", float("nan"), float("nan")
    return "training loss", float(losses[0]), float(np.mean(losses[-10:]))


def tiles(history: History) -> list[Tile]:
    """The headline numbers of a run."""
    which, first, last = fall(history)
    steps = history.steps
    mfu = middle(steps["mfu"])
    peak = float(history.facts.get("peak_measured_flops") or float("nan"))
    seconds = float(np.nansum(steps["seconds"]))
    remark = f"from {first:.2f}, {percent(1 - last / first)} lower" if first > 0 else ""
    return [
        Tile(which.capitalize(), f"{last:.3f}", f"{remark} (nats per token)" if remark else "nats per token"),
        Tile("Tokens", amount(history.tokens), f"in {steps['step'].size:,} steps, {duration(seconds)}"),
        Tile("Speed", f"{middle(steps['tokens_per_second']):,.0f}", "tokens/s, median step"),
        Tile("Model FLOP/s", scaled(middle(steps["model_flops_per_second"]), "FLOP/s"), "median step"),
        Tile("MFU", percent(mfu), f"of {scaled(peak, 'FLOP/s')} measured here"),
    ]


def model_name(history: History) -> str:
    """The model in half a sentence: `A GPT-2 style transformer of 10.1 million parameters (6 layers, 320 wide, …)`."""
    shape, parameters = history.facts.get("shape") or {}, history.facts.get("parameters")
    family = {"gpt2": "GPT-2", "llama": "LLaMA"}.get(shape.get("family", ""), "")
    name = f"A {family} style transformer" if family else "A transformer"
    name += f" of {amount(parameters)} parameters" if parameters else ""
    if {"layers", "width", "heads", "sequence"} <= shape.keys():
        name += f" ({shape['layers']} layers, {shape['width']} wide, {shape['heads']} heads, "
        name += f"{shape['sequence']:,} tokens at a time)"
    return name


def summary(history: History) -> list[str]:
    """What was trained on what, how far the loss fell, and how fast it went, as sentences."""
    steps, facts = history.steps, history.facts
    corpus = corpus_name(history)
    said = [
        f"{model_name(history)} was trained for {int(steps['step'][-1]) if steps['step'].size else 0:,} steps on "
        f"{amount(history.tokens)} tokens{f' of {corpus}' if corpus else ''}."
    ]
    which, first, last = fall(history)
    if first > 0:
        verb = f"fell from {first:.2f} to {last:.2f} nats per token, by {percent(1 - last / first)}"
        if last >= first:
            verb = f"went from {first:.2f} to {last:.2f} nats per token: it did not fall"
        said.append(f"Its {which} {verb}; in perplexity, from {_perplexity(first)} to {_perplexity(last)}.")
    if steps["step"].size:
        precision = PRECISIONS.get(facts.get("precision", ""), "")
        speed = scaled(middle(steps["model_flops_per_second"]), "FLOP/s")
        said.append(
            f"Its steps took {duration(float(np.nansum(steps['seconds'])))} in all; the median step ran at "
            f"{middle(steps['tokens_per_second']):,.0f} tokens/s and {speed}{f' in {precision}' if precision else ''}."
        )
    return said + _incidents(history)


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700.0))
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _incidents(history: History) -> list[str]:
    counts: dict[str, int] = {}
    for event in history.events:
        counts[event.event] = counts.get(event.event, 0) + 1
    said = []
    if count := counts.get("resumed"):
        said.append(f"The run was resumed {'once' if count == 1 else f'{count} times'}.")
    if count := counts.get("skipped step"):
        said.append(f"{count} {'step was' if count == 1 else 'steps were'} skipped, for a loss or gradient not finite.")
    if count := counts.get("damaged checkpoint"):
        said.append(f"{count} damaged {'checkpoint was' if count == 1 else 'checkpoints were'} found and passed over.")
    return said


def corpus_name(history: History) -> str:
    """What the run was trained on: the sources of the data set, or its folder's name."""
    sources = list(history.manifest.get("sources") or {})
    if sources:
        return (
            sources[0] if len(sources) == 1 else f"{', '.join(sources[:3])}{' and others' if len(sources) > 3 else ''}"
        )
    path = history.config.get("data", {}).get("path")
    return f"the data set “{path.rstrip('/').rpartition('/')[2]}”" if isinstance(path, str) else ""
