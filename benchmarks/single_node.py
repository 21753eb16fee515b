"""Tokens/s of tozan's training step beside plain loops over peers' models, alternating in one process.

    python benchmarks/single_node.py                       # GPT-2 124M, bf16, against transformers
    python benchmarks/single_node.py --preset gpt2-350m --micro-batch 2 --rounds 5
    python benchmarks/single_node.py --memory --rounds 2   # only the largest resident set of each side

Both sides train the same shape on the same batches with AdamW (fused) and clipping, and alternate step by step, so a
neighbour's load hits both. The allocator setting that tozan makes for itself is in force for the peer, too; what the
peer gets without it is measured in a process of its own (`--newcomer`). Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tozan import data
from tozan.comm.processor import largest_resident_set
from tozan.config import Loaded, load
from tozan.data import Dataset
from tozan.models.arithmetic import Shape, model_flops
from tozan.train import Run, assemble, machine
from tozan.train.metrics import Clock
from tozan.train.precision import Precision
from tozan.train.run import open_data, shape_of
from tozan.train.step import train_step


def configured(folder: Path, options: argparse.Namespace) -> Loaded:
    """The config of the options, over the standard library's text."""
    data.build(data.corpus.standard_library(limit=4_000_000), folder / "data", vocabulary=4096)
    flags = [
        f"--model.preset={options.preset}",
        f"--data.path={folder / 'data'}",
        f"--run.folder={folder / 'run'}",
        "--train.steps=1000000",
        f"--train.micro_batch={options.micro_batch}",
        "--train.accumulate=1",
        f"--train.precision={options.precision}",
        f"--train.compile={str(options.compile).lower()}",
        f"--train.threads={options.threads}",
        f"--train.kernels={options.kernels}",
    ]
    return load(None, ["--version=1", *flags])


def tozan_run(folder: Path, options: argparse.Namespace) -> Run:
    """A run as `tozan train` assembles it."""
    return assemble(configured(folder, options))


@dataclass
class Bare:
    """What of a run a peer needs: no weights and no state."""

    shape: Shape
    precision: Precision
    data: Dataset


def bare(loaded: Loaded) -> Bare:
    """Set this process up as for a run, and assemble none."""
    train = loaded.config.train
    machine.prepare(train.threads, train.deterministic, train.kernels)
    return Bare(shape_of(loaded), Precision(train.precision, torch.device("cpu")), open_data(loaded.config)[0])


def tozan_step(run: Run) -> Callable[[], int]:
    """One optimizer step, returning its tokens."""

    def step() -> int:
        result = train_step(run, Clock())
        run.step, run.samples = run.step + 1, run.samples + run.global_batch
        return result.tokens

    return step


def transformers_step(run: Run | Bare, options: argparse.Namespace) -> Callable[[], int]:
    """The plain loop over transformers' model of the same shape, as its users write it."""
    import transformers

    shape = run.shape
    if shape.family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=shape.sequence,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        model: torch.nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        llama = transformers.LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.mlp_width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.sequence,
            tie_word_embeddings=shape.tied,
            use_cache=False,
        )
        model = transformers.LlamaForCausalLM(llama)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if options.compile else model
    precision = run.precision.dtype
    samples = 0

    def step() -> int:
        nonlocal samples
        batch = torch.from_numpy(run.data.samples(samples, options.micro_batch))
        samples += options.micro_batch
        tokens = batch[:, :-1].contiguous()
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return tokens.numel()

    return step


def alternate(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Tokens/s of each side in each round; the order turns round every time, one warm-up round is thrown away."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sorted(sides, reverse=number % 2 == 1):
            start = time.perf_counter()
            tokens = sides[name]()
            if number:
                rates[name].append(tokens / (time.perf_counter() - start))
    return rates


ALONE = ("tozan", "transformers", "transformers, allocator untouched")
"""What `--memory` measures, each in a process of its own."""


def alone(side: str) -> tuple[float, float]:
    """Tokens/s of one side in a process of its own, and the largest resident set of that process in bytes."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", side]
    rate, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return float(rate), float(peak)


def compare_memory() -> None:
    """Print the largest resident set of each side, and of the peer where it is smaller."""
    peaks = {side: alone(side)[1] for side in ALONE}
    peer = min(peak for side, peak in peaks.items() if side != "tozan")
    for side, peak in peaks.items():
        print(f"{side:36} {peak / 1e6:8.0f} MB at most  {peak / peer:5.2f}× the peer's least")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--kernels", choices=["auto", "plain"], default="auto", help="on tozan's side")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--newcomer", action="store_true", help="also measure the peer with the allocator untouched")
    parser.add_argument("--memory", action="store_true", help="only peak memory, each side in a process of its own")
    parser.add_argument("--only", choices=ALONE, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    options = parser.parse_args()
    if options.only and "untouched" in options.only:
        machine.set_allocator = lambda: None
    if options.memory and not options.only:
        compare_memory()
        return
    with tempfile.TemporaryDirectory() as folder:
        loaded = configured(Path(folder), options)
        if options.only:
            peer = options.only != "tozan"
            step = transformers_step(bare(loaded), options) if peer else tozan_step(assemble(loaded))
            print(statistics.median(alternate({"": step}, options.rounds)[""]), largest_resident_set())
            return
        run = assemble(loaded)
        sides = {"transformers": transformers_step(run, options), "tozan": tozan_step(run)}
        rates = alternate(sides, options.rounds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    if options.newcomer:
        medians["transformers, allocator untouched"] = alone("transformers, allocator untouched")[0]
    flops = model_flops(run.shape) / run.shape.sequence
    print(f"{options.preset}, {options.precision}, micro-batch {options.micro_batch}, {options.rounds} rounds,")
    print(f"{torch.get_num_threads()} threads, best GEMM {run.peak_flops / 1e12:.2f} TFLOP/s, {machine.describe()}")
    for name, rate in medians.items():
        mfu = rate * flops / run.peak_flops
        print(f"{name:36} {rate:8.0f} tokens/s  MFU {mfu:5.1%}  {rate / medians['transformers']:5.2f}× transformers")
    if options.out:
        record = {"options": vars(options) | {"out": str(options.out)}, "tokens_per_second": rates, "medians": medians}
        record |= {"peak_flops": run.peak_flops, "machine": machine.describe(), "torch": torch.__version__}
        options.out.write_text(json.dumps(record, indent=2, default=str))


if __name__ == "__main__":
    main()
