"""From nothing to a trained model and a page about it, in a few minutes on any machine: what `tozan demo` does."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from tozan import config, data, report, train
from tozan.amounts import duration, percent, scaled
from tozan.data import Manifest, Tokenizer
from tozan.errors import Problem, UserError
from tozan.files import replace
from tozan.models.generate import generate
from tozan.report.live import Live
from tozan.train import machine
from tozan.train.clock import Clock
from tozan.train.step import train_step

STANDARD_LIBRARY = "standard-library"
VOCABULARY = 8192
"""Of sizes 1,024 to 8,192 the one whose held-out loss falls furthest in a few hundred thousand tokens."""
MODEL = "demo-10m"
SEQUENCE = 256
"""Of the preset."""
STEPS = 600
"""Steps to aim for; the batch grows with the machine's speed instead, once it is large enough to be learnt from."""
EVALUATIONS = 6
HELD_OUT_SAMPLES = 32
EVALUATION_SHARE = 0.15
"""Of the time at most; a slow machine scores fewer samples."""
MOST_EPOCHS = 6
"""On a fast machine the run ends early rather than read the corpus more often than this."""
SAMPLE_TOKENS = 220


@dataclass(frozen=True)
class Plan:
    """How much training fits into the time.

    Attributes:
        steps: optimizer steps.
        batch: samples in a step.
        held_out: samples in an evaluation.
        tokens_per_second: the rate measured on this machine, now.
    """

    steps: int
    batch: int
    held_out: int
    tokens_per_second: float

    @property
    def seconds(self) -> float:
        """Expected length of the training, evaluations included."""
        return (self.steps * self.batch + evaluation_cost(self.held_out)) * SEQUENCE / self.tokens_per_second


def evaluation_cost(held_out: int) -> float:
    """All evaluations in training samples: a held-out one costs a third, as it goes forward only."""
    return (EVALUATIONS + 1) * held_out / 3


def run(
    out: Path = Path("runs/demo"),
    corpus: str = STANDARD_LIBRARY,
    minutes: float = 3.3,
    console: Console | None = None,
) -> Path:
    """Gather text, train a tokenizer and a model of about 10 million parameters, write a sample and a page.

    A data set that an earlier demo of the same corpus left in `out` is used again; every call makes a run of its own.

    Args:
        out: folder for the data set and the runs.
        corpus: `standard-library` (the running Python's documentation and source), `debian` (Japanese and English
            documentation from Debian packages), or a file, folder or glob of text.
        minutes: how long to train; the speed is measured first, and the steps are chosen to fit.
        console: where to write. Default: standard output.

    Returns:
        The page, an HTML file.

    Raises:
        UserError: the corpus is not there or holds too little text, or the time is not positive.
    """
    if not (math.isfinite(minutes) and minutes > 0):
        raise UserError(Problem("--minutes", f"{minutes} is no length of time to train for", "write a number above 0"))
    console = console or Console(highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    folder = gather(out / "data", corpus, console)
    precision = fastest_precision()
    plan = calibrate(folder, precision, minutes)
    console.print(
        f"This machine trains at {plan.tokens_per_second:,.0f} tokens/s in {precision}: {plan.steps} steps of "
        f"{plan.batch * SEQUENCE:,} tokens, about {duration(plan.seconds)}.\n"
    )
    written = write_config(next_run(out), folder, plan, precision)
    loaded = config.load(written)
    with Live(plan.steps, console=console, title="demo") as live:
        result = train.train(loaded, live.record)
    heading, text = sample(result.folder, folder, corpus)
    replace(result.folder / "sample.txt", f"{heading}\n\n{text}\n".encode())
    page = report.write(result.folder)
    _tell(console, result.folder, written, page, heading, text)
    return page


def gather(folder: Path, corpus: str, console: Console) -> Path:
    """The data set of a corpus: built, or found finished.

    Raises:
        UserError: the corpus is not there, or too small to hold anything out from.
    """
    mark = folder.with_name("corpus.json")
    recipe = {"corpus": corpus, "vocabulary": VOCABULARY}
    if mark.is_file() and (folder / "manifest.json").is_file() and json.loads(mark.read_text()) == recipe:
        console.print(f"Uses the data set of the demo before, {folder}; delete it to gather anew.", soft_wrap=True)
        return folder
    console.print("Gathers text, trains a tokenizer and writes shards:")

    def say(text: str) -> None:
        console.print(f"  {text}", markup=False, soft_wrap=True)

    notes: Counter[str] = Counter()
    texts = data.corpus.gather([corpus], errors="replace", notes=notes, on_event=say)
    manifest = data.build(texts, folder, vocabulary=VOCABULARY, overwrite=True, notes=notes, on_event=say)
    _check_size(manifest, corpus)
    replace(mark, json.dumps(recipe).encode())
    licences = ", ".join(f"{name} ({amount.documents:,} documents)" for name, amount in manifest.licences.items())
    say(f"licences: {licences}")
    return folder


def _check_size(manifest: Manifest, corpus: str) -> None:
    few = [
        f"{split} has {manifest.splits[split].tokens if split in manifest.splits else 0:,} tokens"
        for split in ("train", "validation")
        if split not in manifest.splits or manifest.splits[split].tokens <= 8 * SEQUENCE
    ]
    if few:
        what = f"too little text: {', '.join(few)}, and a demo needs more than {8 * SEQUENCE:,} in each"
        raise UserError(Problem(f"--corpus {corpus}", what, "name a folder with a few megabytes of text"))


def fastest_precision() -> str:
    """bf16 or fp32, whichever multiplies faster here: processors without bf16 instructions only imitate it."""
    device = machine.choose_device("auto")
    machine.prepare(threads=0, deterministic=True, device=device)
    rates = {
        name: machine.measure_gemm_rate(dtype, device, seconds=0.3)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    return max(rates, key=lambda name: rates[name])


def calibrate(folder: Path, precision: str, minutes: float, seconds: float = 8.0) -> Plan:
    """Train a throw-away model for a few seconds, and plan a run of `minutes` from its speed.

    Args:
        folder: a data set.
        precision: compute type.
        minutes: time that the run may take.
        seconds: time to measure for, after two steps of warming up.
    """
    with tempfile.TemporaryDirectory() as scratch:
        trial = Plan(steps=10_000, batch=8, held_out=1, tokens_per_second=math.nan)
        measured = train.assemble(config.load(write_config(Path(scratch) / "trial", folder, trial, precision)))
        laps: list[float] = []
        clock, end = Clock(), math.inf
        while time.perf_counter() < end or len(laps) < 5:
            train_step(measured, clock)
            laps.append(clock.lap()[0])
            if len(laps) == 2:
                end = time.perf_counter() + min(seconds, 12 * minutes)
    rate = trial.batch * SEQUENCE / statistics.fmean(laps[2:])
    return fit_into(minutes * 60, rate, Manifest.read(folder).splits["train"].tokens)


def fit_into(seconds: float, tokens_per_second: float, corpus_tokens: int) -> Plan:
    """Steps and batch that fill a time: about `STEPS` steps, of a batch between 4 and 64 samples.

    Args:
        seconds: time for training and evaluating.
        tokens_per_second: speed of training.
        corpus_tokens: tokens in the train split.
    """
    most = seconds * tokens_per_second / SEQUENCE
    held_out = min(HELD_OUT_SAMPLES, max(1, int(EVALUATION_SHARE * most / evaluation_cost(1))))
    samples = min(most - evaluation_cost(held_out), MOST_EPOCHS * corpus_tokens / SEQUENCE)
    batch = min(64, max(4, 2 ** round(math.log2(max(1.0, samples / STEPS)))))
    return Plan(max(2, int(samples / batch)), batch, held_out, tokens_per_second)


def next_run(out: Path) -> Path:
    """The first run folder that is not taken: `run-1`, `run-2` and so on."""
    number = 1
    while (out / f"run-{number}").exists():
        number += 1
    return out / f"run-{number}"


def write_config(folder: Path, dataset: Path, plan: Plan, precision: str) -> Path:
    """Write the config of a run beside its folder; `tozan train` takes it as it is."""
    every = max(1, math.ceil(plan.steps / EVALUATIONS))
    tables: dict[str, dict[str, object]] = {
        "run": {"folder": str(folder)},
        "model": {"preset": MODEL},
        "data": {"path": str(dataset)},
        "train": {
            "steps": plan.steps,
            "micro_batch": min(plan.batch, 16),
            "global_batch": plan.batch,
            "precision": precision,
        },
        "optim": {"lr": 3e-3, "beta2": 0.98, "schedule": "linear", "warmup": max(1, plan.steps // 20)},
        "eval": {"every": every, "samples": plan.held_out},
        "checkpoint": {"every": max(1, math.ceil(plan.steps / 2))},
    }
    lines = [
        "# The run of `tozan demo`; `tozan train` with this file and another --run.folder repeats it.",
        "version = 1",
    ]
    for table, values in tables.items():
        lines += ["", f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path = folder.with_name(folder.name + ".toml")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def sample(run_folder: Path, dataset: Path, corpus: str) -> tuple[str, str]:
    """A heading that says what follows, and text that the trained model wrote."""
    model, tokenizer, meta = train.open_model(run_folder)
    # No space at the end: the tokenizer puts spaces in front of words.
    prompt = "def __init__(self" if corpus == STANDARD_LIBRARY else _opening(dataset, tokenizer)
    start = torch.tensor([tokenizer.encode(prompt)])
    device = next(model.parameters()).device
    written = generate(model, start.to(device), SAMPLE_TOKENS, temperature=0.6, top_p=0.9, seed=1, stop={tokenizer.end})
    tokens = [int(token) for token in written]
    ended = tokenizer.end in tokens
    text = prompt + tokenizer.decode(tokens[: tokens.index(tokenizer.end)] if ended else tokens)
    return f"Written by the model after {meta['tokens']:,} tokens of training, given {prompt!r}:", text


def _opening(dataset: Path, tokenizer: Tokenizer) -> str:
    """The first few tokens of the held-out text."""
    held_out = data.Dataset.open(dataset, "validation", sequence=SEQUENCE, seed=0)
    try:
        return tokenizer.decode(held_out.in_order(1)[0][:8].tolist())
    finally:
        held_out.close()


def _tell(console: Console, folder: Path, written: Path, page: Path, heading: str, text: str) -> None:
    """The end of the demo: the sample, what was reached, and what to try next."""
    from tozan.report import history, words

    found = history.read(folder)
    which, first, last = words.fall(found)
    speed = scaled(words.middle(found.steps["model_flops_per_second"]), "FLOP/s")
    console.print()
    console.rule(Text(heading, style="bold"), align="left")
    console.print(text, markup=False)
    console.rule()
    console.print(
        f"The {which} fell from {first:.3f} to {last:.3f} nats per token, by {percent(1 - last / first)}, "
        f"at {words.middle(found.steps['tokens_per_second']):,.0f} tokens/s ({speed}).\n"
    )
    for name, value in {
        "page": str(page),
        "checkpoints": str(folder / "checkpoints"),
        "more text": f'tozan generate {folder} --prompt "class Reader"',
        "score": f"tozan eval {folder}",
        "once more": f"tozan train {written} --run.folder {folder}-again",
    }.items():
        console.print(f"  {name:<12}{value}", markup=False, soft_wrap=True)
