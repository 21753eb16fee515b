"""Rules that tie several fields together. Each names the keys it reads, so that it still runs when others are wrong."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tozan.amounts import many
from tozan.config.batch import neighbours
from tozan.config.schema import Config
from tozan.cpuinfo import cores, hardware_threads
from tozan.errors import Problem
from tozan.models import arithmetic

Finding = tuple[str, str]
"""What is wrong (values and rule with their numbers), and what to write instead."""

LARGEST_MODEL = 10**13
"""Parameters. Ten times the largest model trained so far; beyond it a size was mistyped."""


@dataclass(frozen=True)
class Rule:
    """A rule over several keys.

    Attributes:
        keys: the keys it reads; it is skipped when one of them is already known to be wrong.
        find: yields what breaks it.
        warning: a run that breaks it may still start.
    """

    keys: tuple[str, ...]
    find: Callable[[Config], Iterator[Finding]]
    warning: bool


RULES: list[Rule] = []


def _rule(*keys: str, warning: bool = False) -> Callable[[Callable[[Config], Iterator[Finding]]], Rule]:
    def add(find: Callable[[Config], Iterator[Finding]]) -> Rule:
        RULES.append(Rule(keys, find, warning))
        return RULES[-1]

    return add


def check(config: Config, world_size: int | None = None, origin: Mapping[str, str] | None = None) -> list[Problem]:
    """All broken rules of a config whose fields are each valid.

    Args:
        config: what to check.
        world_size: processes that will run it; None: not known yet, any number is fine.
        origin: where each value comes from, by `table.key`.
    """
    found = broken(config, origin or {}, warnings=False)
    if world_size is not None and config.layout.processes != world_size:
        found.append(processes(config, world_size, origin or {}))
    return found


def broken(config: Config, origin: Mapping[str, str], *, warnings: bool, wrong: Collection[str] = ()) -> list[Problem]:
    """Broken rules (or those of the warning kind), leaving out rules that read a key in `wrong`."""
    rules = [rule for rule in RULES if rule.warning == warnings and not set(rule.keys) & set(wrong)]
    return [Problem(places(origin, rule.keys), *finding) for rule in rules for finding in rule.find(config)]


def places(origin: Mapping[str, str], keys: Collection[str]) -> str:
    """Where the values of `keys` were written: lines in order, flags, presets, and no defaults unless all are."""
    found = {origin.get(key, "default") for key in keys}
    written = sorted((place for place in found if not place.startswith(("default", "solved"))), key=_rank)
    return ", ".join(written) or next(iter(keys))


def _rank(place: str) -> tuple[int, int, str]:
    line = place.rpartition(":")[2]
    if line.isdecimal():
        return 0, int(line), place
    return 2 if place.startswith("preset ") else 1, 0, place


SIZES = ("data", "context", "tensor", "pipeline")
"""Sizes of a layout; their product is the number of processes."""


def processes(config: Config, world_size: int, origin: Mapping[str, str]) -> Problem:
    """The problem with a layout that needs another number of processes than a run has."""
    layout = config.layout
    sizes = [f"layout.{name} {getattr(layout, name)}" for name in SIZES if getattr(layout, name) > 1]
    count = many(layout.processes, "process")
    what = f"{' × '.join(sizes) or 'layout.data 1'} needs {count}, this run has {world_size}"
    others = layout.context * layout.tensor * layout.pipeline
    fix = f"start {count} (torchrun --nproc-per-node {layout.processes} -m tozan train ...)"
    if world_size % others == 0:
        fix += f", or set layout.data = {world_size // others}"
    return Problem(places(origin, [f"layout.{name}" for name in SIZES]), what, fix)


def _divisors_near(number: int, wish: int) -> str:
    """The divisors of `number` next to `wish`, as `11 or 16`."""
    below = next((d for d in range(min(wish, number), 0, -1) if number % d == 0), 1)
    above = next((d for d in range(wish + 1, min(number, 65_536) + 1) if number % d == 0), below)
    return " or ".join(map(str, sorted({below, above})))


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


@_rule("model.width", "model.heads")
def heads_divide_width(config: Config) -> Iterator[Finding]:
    """Every head has the same whole size."""
    width, heads = config.model.width, config.model.heads
    if width % heads:
        yield (
            f"model.width {width} is not a multiple of model.heads {heads} ({width} / {heads} = {width / heads:.2f})",
            f"write width = {_either(neighbours(width, heads))}, or heads = {_divisors_near(width, heads)}",
        )


@_rule("model.heads", "model.kv_heads")
def kv_heads_divide_heads(config: Config) -> Iterator[Finding]:
    """Every key/value head serves the same number of query heads."""
    heads, kv_heads = config.model.heads, config.model.kv_heads
    if kv_heads is not None and heads % kv_heads:
        yield (
            f"model.heads {heads} is not a multiple of model.kv_heads {kv_heads}",
            f"write kv_heads = {_divisors_near(heads, kv_heads)}, or leave it out for {heads}",
        )


@_rule("model.family", "model.width", "model.heads")
def rotary_heads_are_even(config: Config) -> Iterator[Finding]:
    """RoPE turns pairs of numbers."""
    model = config.model
    size = model.width // model.heads
    if model.family == "llama" and model.width % model.heads == 0 and size % 2:
        yield (
            f"head size {size} (model.width {model.width} / model.heads {model.heads}) is odd; RoPE turns pairs",
            f"write width = {_either([w for w in (model.heads * (size - 1), model.heads * (size + 1)) if w])}",
        )


@_rule("model.layers", "model.width", "model.heads", "model.kv_heads", "model.mlp_width", "model.vocabulary")
def model_is_possible(config: Config) -> Iterator[Finding]:
    """Sizes that are each allowed can still multiply to the absurd."""
    count = arithmetic.parameters(arithmetic.resolve(config.model, tokenizer_size=64))
    if count > LARGEST_MODEL:
        yield (
            f"model.layers {config.model.layers} × width {config.model.width} and its other sizes make {count:.1e} "
            f"parameters; the limit is {LARGEST_MODEL:.0e}",
            "write smaller sizes, or a preset: `tozan config show --presets` lists them",
        )


@_rule("train.steps", "optim.warmup")
def warmup_ends(config: Config) -> Iterator[Finding]:
    """A warm-up as long as the run never reaches the peak."""
    steps, warmup = config.train.steps, config.optim.warmup
    if warmup and warmup >= steps:
        yield (
            f"optim.warmup {warmup} must be less than train.steps {steps}",
            f"write warmup = {steps // 10}, or steps = {warmup * 10} (warm-up a tenth of the run)",
        )


@_rule("train.steps", "optim.warmup", "optim.decay", "optim.schedule")
def decay_fits(config: Config) -> Iterator[Finding]:
    """Warm-up and decay do not overlap."""
    steps, warmup, decay = config.train.steps, config.optim.warmup, config.optim.decay
    if config.optim.schedule == "wsd" and decay is not None and warmup < steps < warmup + decay:
        yield (
            f"optim.warmup {warmup} + optim.decay {decay} = {warmup + decay} is more than train.steps {steps}",
            f"write decay = {steps - warmup} or less, or steps = {warmup + decay} or more",
        )


@_rule("optim.decay", "optim.schedule", warning=True)
def decay_has_effect(config: Config) -> Iterator[Finding]:
    """Only `wsd` has a decay phase of its own."""
    if config.optim.decay is not None and config.optim.schedule != "wsd":
        yield (
            f'optim.decay {config.optim.decay} has no effect with schedule "{config.optim.schedule}"',
            'write schedule = "wsd", or leave decay out',
        )


@_rule("optim.lr", "optim.min_lr")
def rates_are_ordered(config: Config) -> Iterator[Finding]:
    """The learning rate falls."""
    lr, least = config.optim.lr, config.optim.min_lr
    if least > lr:
        yield (
            f"optim.min_lr {least:g} is above optim.lr {lr:g}",
            f"write min_lr = {lr / 10:.6g} (a tenth of lr), or lr = {least:g} or more",
        )


@_rule("optim.min_lr", "optim.schedule", warning=True)
def min_lr_has_effect(config: Config) -> Iterator[Finding]:
    """A constant rate has no smaller end."""
    if config.optim.min_lr and config.optim.schedule == "constant":
        yield (
            f'optim.min_lr {config.optim.min_lr:g} has no effect with schedule "constant"',
            "leave min_lr out, or write another schedule",
        )


@_rule("layout.tensor", "layout.scheme", "layout.depth")
def grid_is_square(config: Config) -> Iterator[Finding]:
    """2D lies on q × q processes, 2.5D on q × q × depth; 1D has no depth."""
    layout = config.layout
    if layout.scheme != "2.5d" and layout.depth > 1:
        yield f"layout.depth {layout.depth} belongs to scheme 2.5d, not {layout.scheme}", "write depth = 1"
    elif layout.scheme != "1d" and layout.depth * math.isqrt(layout.tensor // layout.depth) ** 2 != layout.tensor:
        side = max(1, math.isqrt(layout.tensor // layout.depth))
        near = [layout.depth * q * q for q in (side, side + 1)]
        grid = "q × q" if layout.scheme == "2d" else f"depth {layout.depth} × q × q"
        yield f"layout.tensor {layout.tensor} is not {grid} for any whole q", f"write tensor = {_either(near)}"


@_rule("layout.zero", "layout.zero_group", "layout.data", "layout.context", "layout.pipeline")
def zero_has_replicas(config: Config) -> Iterator[Finding]:
    """ZeRO shares between replicas; a pipeline runs several micro-batches at once, and needs its parameters for all."""
    layout, group = config.layout, config.layout.zero_group
    if group is not None and layout.zero == 0:
        yield f"layout.zero_group {group} with zero 0: nothing is shared", "write zero = 1, or leave zero_group out"
    elif group is not None and (ranks := layout.data * layout.context) % group:
        context = f" × context {layout.context}" if layout.context > 1 else ""
        rest = f"layout.data {layout.data}{context} ÷ zero_group {group} leaves {ranks % group} over"
        yield rest, f"write zero_group = {_divisors_near(ranks, group)}"
    if layout.zero == 3 and layout.pipeline > 1:
        what = f"layout.zero 3 with pipeline {layout.pipeline}, whose micro-batches need all parameters all the time"
        yield what, "write zero = 2, or pipeline = 1"


@_rule("layout.zero", "layout.data", "layout.context", warning=True)
def zero_has_effect(config: Config) -> Iterator[Finding]:
    """A single replica has nobody to share with."""
    layout = config.layout
    if layout.zero and layout.data * layout.context == 1:
        yield f"layout.zero {layout.zero} has no effect with 1 replica", "write data = 2 or more, or leave zero out"


@_rule("layout.zero", "train.compile")
def compiled_blocks_keep_their_parameters(config: Config) -> Iterator[Finding]:
    """ZeRO 3 takes a block's parameters away between its passes."""
    if config.train.compile and config.layout.zero == 3:
        yield "train.compile with layout.zero 3, whose parameters come and go", "write compile = false, or zero = 2"


@_rule("layout.sequence_parallel", "layout.tensor")
def sequences_have_ranks(config: Config) -> Iterator[Finding]:
    """Sequence parallelism lies along the tensor-parallel processes."""
    if config.layout.sequence_parallel and config.layout.tensor == 1:
        yield "layout.sequence_parallel with tensor 1: nobody to share the tokens with", "leave it out, or tensor = 2"


@_rule("layout.split", "layout.pipeline", "layout.chunks", "model.layers")
def split_is_whole(config: Config) -> Iterator[Finding]:
    """A split says how many layers each piece of the pipeline has, and they are all the layers."""
    split, layout, layers = config.layout.split, config.layout, config.model.layers
    pieces = layout.pipeline * layout.chunks
    sizes = " + ".join(map(str, split))
    if split and layout.pipeline == 1:
        yield f"layout.split {split} with pipeline 1: there is nothing to split", "leave split out, or write pipeline"
    elif split and len(split) != pieces:
        chunks = f" × chunks {layout.chunks}" if layout.chunks > 1 else ""
        what = f"layout.split {split} has {len(split)} numbers for pipeline {layout.pipeline}{chunks} = {pieces} pieces"
        yield what, "write one number for each piece, or leave split out"
    elif split and sum(split) != layers:
        yield f"layout.split {sizes} = {sum(split)} layers, model.layers is {layers}", f"write layers = {sum(split)}"


@_rule("train.recompute_stages", "layout.pipeline")
def recompute_names_every_stage(config: Config) -> Iterator[Finding]:
    """One word for each pipeline stage."""
    words, stages = config.train.recompute_stages, config.layout.pipeline
    if words and len(words) != stages:
        what = f"train.recompute_stages has {len(words)} words for {stages} pipeline stages"
        yield what, "write one word for each stage, or recompute with one word for all"


@_rule("metrics.profile")
def profile_is_a_range(config: Config) -> Iterator[Finding]:
    """First and last step; steps are counted from 1."""
    profile = config.metrics.profile
    if len(profile) == 1:
        fix = f"write profile = [{profile[0]}, {profile[0] + 2}]"
        yield f"metrics.profile {profile} has 1 number; it takes the first and the last step", fix
    elif profile and not 1 <= profile[0] <= profile[1]:
        low, high = max(1, min(profile)), max(1, *profile)
        fix = f"write profile = [{low}, {high}]"
        yield f"metrics.profile {profile} is not a range of steps: 1 ≤ first ≤ last", fix


@_rule("metrics.profile", "train.steps")
def profile_is_reached(config: Config) -> Iterator[Finding]:
    """The traced steps are steps of this run."""
    profile, steps = config.metrics.profile, config.train.steps
    if profile and max(profile) > steps:
        fix = f"write such as profile = [{max(1, steps - 2)}, {steps}], or steps = {max(profile)} or more"
        yield f"metrics.profile {profile} ends after train.steps {steps}", fix


@_rule("checkpoint.every", "checkpoint.keep_every")
def kept_checkpoints_exist(config: Config) -> Iterator[Finding]:
    """What is to be kept must have been saved."""
    every, keep = config.checkpoint.every, config.checkpoint.keep_every
    if keep and not every:
        yield (
            f"checkpoint.keep_every {keep} keeps nothing, since checkpoint.every 0 saves only at the end",
            f"write every = {keep}, or keep_every = 0",
        )
    elif keep and keep % every:
        yield (
            f"checkpoint.keep_every {keep} is not a multiple of checkpoint.every {every}",
            f"write keep_every = {_either(neighbours(keep, every))}",
        )


@_rule("train.precision", "train.device", warning=True)
def fp16_is_slow(config: Config) -> Iterator[Finding]:
    """CPUs compute fp16 no faster than fp32, most far slower; bf16 has units of its own."""
    device = config.train.device
    if config.train.precision == "fp16" and (device == "cpu" or (device == "auto" and not has_gpu())):
        yield (
            'train.precision "fp16" is slow on a CPU',
            'write precision = "bf16" unless fp16\'s numerics are the point',
        )


@_rule("train.threads", warning=True)
def threads_have_cores(config: Config) -> Iterator[Finding]:
    """More threads than cores take turns at the cores' multipliers, also where each has a hardware thread."""
    threads, here = config.train.threads, cores()
    if threads > here:
        has = many(here, "core")
        if (shown := hardware_threads()) > here:
            has += f" ({shown} hardware threads, which share their cores' multipliers)"
        yield (
            f"train.threads {threads} is more than the {has} that this process may use here",
            f"write threads = {here}, or 0 for all cores",
        )


@_rule(
    *("model.layers", "model.width", "model.heads", "model.kv_heads", "model.mlp_width", "model.vocabulary"),
    "train.precision",
    warning=True,
)
def state_fits_memory(config: Config) -> Iterator[Finding]:
    """Weights, gradients and AdamW's two moments take 16 bytes a parameter in every process (fp64: 32)."""
    if not hasattr(os, "sysconf") or config.model.width % config.model.heads:
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    count = arithmetic.parameters(arithmetic.resolve(config.model, tokenizer_size=64))
    each = 32 if config.train.precision == "fp64" else 16
    need = each * count
    if need > memory:
        yield (
            f"{count:,} parameters × {each} bytes (weights, gradients, AdamW) = {need / 2**30:.0f} GiB per process; "
            f"this machine has {memory / 2**30:.0f} GiB",
            "train it on a larger machine, or write smaller sizes",
        )


def has_gpu() -> bool:
    """Whether this machine shows a GPU, without asking torch (which takes seconds to import)."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg"))
