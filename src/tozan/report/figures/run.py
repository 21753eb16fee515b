"""How a run went: loss, speed, gradient norm, learning rate."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tozan.amounts import percent, scaled
from tozan.report.drawing import Figure, figure, table
from tozan.report.history import Event, History, smooth, thin
from tozan.report.marks import AMBER, BLUE, MUTED, RED, label_ends, plain
from tozan.report.words import middle


def of_run(history: History) -> list[Figure]:
    """Every figure that the metrics have data for, in the order of the page."""
    makers = (loss, throughput, gradient_norm, learning_rate)
    return [made for maker in makers if (made := maker(history)) is not None]


def loss(history: History) -> Figure | None:
    """Training loss (raw and smoothed) and held-out loss over the tokens trained on."""
    steps, evals = history.steps, history.evals
    if not np.isfinite(steps["loss"]).any():
        return None
    smoothed = smooth(steps["loss"])

    def draw(axes: Axes, _narrow: bool) -> None:
        axes.plot(*thin(steps["tokens"], steps["loss"]), color=BLUE, linewidth=0.8, alpha=0.35)
        axes.plot(*thin(steps["tokens"], smoothed), color=BLUE)
        x, y = thin(evals["trained"], evals["loss"])
        axes.plot(x, y, color=AMBER, marker="o", markersize=3.5 if x.size < 60 else 0)
        names = [("training", float(smoothed[-1]), BLUE)]
        if y.size:
            names.append(("held-out", float(y[-1]), AMBER))
        label_ends(axes, float(steps["tokens"][-1]), names)
        plain(axes, "tokens", "loss (nats per token)")

    held_out = evals["loss"]
    words = f"Training loss goes from {steps['loss'][0]:.2f} to {smoothed[-1]:.2f} (smoothed) nats per token"
    if held_out.size:
        words += f", held-out loss from {held_out[0]:.2f} to {held_out[-1]:.2f}"
    at = dict(zip(evals["step"].tolist(), held_out.tolist(), strict=True))
    column = np.array([at.get(step, math.nan) for step in steps["step"].tolist()])
    data = {"step": steps["step"], "tokens": steps["tokens"], "training_loss": steps["loss"], "held_out_loss": column}
    if evals["step"].size and evals["step"][0] == 0 and (not steps["step"].size or steps["step"][0] > 0):
        first = [0.0, 0.0, math.nan, float(held_out[0])]
        data = {name: np.append(value, values) for (name, values), value in zip(data.items(), first, strict=True)}
    caption = "Thin: each step. Thick: smoothed over 2% of the run. Dots: the same held-out samples each time."
    return figure("loss", "Loss over tokens", words + ".", draw, table(data), caption)


def throughput(history: History) -> Figure | None:
    """Tokens per second of every step, with the median."""
    steps = history.steps
    rate, median = steps["tokens_per_second"], middle(steps["tokens_per_second"])
    if not math.isfinite(median):
        return None

    def draw(axes: Axes, _narrow: bool) -> None:
        axes.plot(*thin(steps["step"], rate), color=BLUE, linewidth=1.0)
        axes.axhline(median, color=AMBER, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 1.18 * float(np.nanpercentile(rate, 99.5)))
        label_ends(axes, float(steps["step"][-1]), [("median", median, AMBER)])
        plain(axes, "step", "tokens per second")

    low, high = (float(np.nanpercentile(rate, at)) for at in (5, 95))
    flops = middle(steps["model_flops_per_second"])
    words = f"The median step runs at {median:,.0f} tokens/s; nine of ten lie between {low:,.0f} and {high:,.0f}."
    names = ("step", "seconds", "tokens_per_second", "model_flops_per_second", "mfu")
    caption = (
        f"Median {median:,.0f} tokens/s = {scaled(flops, 'FLOP/s')} of the model = MFU {percent(middle(steps['mfu']))}."
    )
    return figure("throughput", "Throughput", words, draw, table({name: steps[name] for name in names}), caption)


def gradient_norm(history: History) -> Figure | None:
    """Global gradient norm over steps, with resumes, skipped steps and checkpoints marked."""
    steps = history.steps
    norm = steps["grad_norm"]
    if not np.isfinite(norm).any():
        return None
    marks = {
        "checkpoint": _at(history.events, "checkpoint"),
        "resumed": _at(history.events, "resumed"),
        "skipped": _at(history.events, "skipped step"),
    }

    def draw(axes: Axes, _narrow: bool) -> None:
        axes.plot(*thin(steps["step"], np.where(norm > 0, norm, np.nan)), color=BLUE, linewidth=1.0)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10.0, subs=(1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        for where, colour, style in ((marks["resumed"], AMBER, (0, (4, 3))), (marks["skipped"], RED, "solid")):
            for step in where[:200]:
                axes.axvline(step, color=colour, linewidth=1.1, linestyle=style)
        floor = axes.get_xaxis_transform()
        axes.plot(
            marks["checkpoint"][:400],
            [0.02] * len(marks["checkpoint"][:400]),
            "^",
            color=MUTED,
            markersize=4.5,
            transform=floor,
        )
        plain(axes, "step", "gradient norm (log scale)")

    counts = {
        "checkpoints": len(marks["checkpoint"]),
        "resumes": len(marks["resumed"]),
        "skipped steps": len(marks["skipped"]),
    }
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    words = f"The median gradient norm is {middle(norm):.3g} before clipping; marked are {said}."
    caption = "Before clipping. ▲ checkpoint; dashed: resumed; red: skipped step."
    data = table({"step": steps["step"], "grad_norm": norm})
    return figure("gradient-norm", "Gradient norm and events", words, draw, data, caption)


def learning_rate(history: History) -> Figure | None:
    """Learning rate over steps."""
    steps = history.steps
    rate = steps["lr"]
    if not np.isfinite(rate).any():
        return None

    def draw(axes: Axes, _narrow: bool) -> None:
        axes.plot(*thin(steps["step"], rate), color=BLUE)
        axes.set_ylim(0, 1.1 * float(np.nanmax(rate)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        plain(axes, "step", "learning rate")

    peak = int(np.nanargmax(rate))
    words = f"The learning rate peaks at {rate[peak]:.3g} at step {steps['step'][peak]:.0f} and ends at {rate[-1]:.3g}."
    return figure("learning-rate", "Learning rate", words, draw, table({"step": steps["step"], "lr": rate}))


def _at(events: list[Event], kind: str) -> list[int]:
    return sorted({event.step for event in events if event.event == kind})
