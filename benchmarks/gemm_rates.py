"""The rates of `tozan bench gemm` beside an independent loop over the same products, alternating in one process.

    python benchmarks/gemm_rates.py --model gpt2-124m --precision bf16 --threads 2 --rounds 5

The other side is `torch.utils.benchmark.Timer` with operands and calls of its own, written here from the sizes alone.
Both take the median of a round, and the rounds alternate, so that a neighbour's load hits both.
"""

import argparse
import statistics

import torch
from torch.utils.benchmark import Timer

from tozan.bench.gemm import call, default_micro_batch, step_products
from tozan.bench.measure import times
from tozan.planner.plan import find_shape
from tozan.train import machine

CALLS = {
    ("nt", False): "torch.nn.functional.linear(a, b)",
    ("nn", False): "torch.mm(a, b)",
    ("tn", False): "torch.mm(a.t(), b)",
    ("nt", True): "torch.bmm(a, b.transpose(1, 2))",
    ("nn", True): "torch.bmm(a, b)",
    ("tn", True): "torch.bmm(a.transpose(1, 2), b)",
}


def independent(one, dtype, threads):
    """Timer over random operands of the product's sizes, in the order that the form says."""
    first = {"nt": (one.m, one.k), "nn": (one.m, one.k), "tn": (one.k, one.m)}[one.form]
    second = {"nt": (one.n, one.k), "nn": (one.k, one.n), "tn": (one.k, one.n)}[one.form]
    batch = (one.batch,) if one.batch > 1 else ()
    operands = {"a": torch.rand(*batch, *first).sub(0.5).to(dtype), "b": torch.rand(*batch, *second).sub(0.5).to(dtype)}
    return Timer(CALLS[one.form, one.batch > 1], globals={"torch": torch, **operands}, num_threads=threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-124m")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a round of one side")
    given = parser.parse_args()
    machine.prepare(given.threads, deterministic=False)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[given.precision]
    shape = find_shape(given.model)
    listed = step_products(shape, dtype, given.micro_batch or default_micro_batch(shape))
    ratios = []
    print(f"{'product':34}{'shape':>22}{'tozan':>14}{'Timer':>14}{'ratio':>8}")
    for one in listed:
        ours, theirs = [], []
        run, timer = call(one, dtype), independent(one, dtype, given.threads)
        for number in range(given.rounds):
            for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                if side == "ours":
                    ours.append(statistics.median(times(run, given.seconds)))
                else:
                    theirs.append(timer.blocked_autorange(min_run_time=given.seconds).median)
        mine, other = (one.flops / statistics.median(side) / 1e9 for side in (ours, theirs))
        ratios.append(mine / other)
        print(
            f"{one.name + ' ' + one.direction:34}{one.label:>22}{mine:8.1f} GFLOP{other:8.1f} GFLOP{mine / other:8.3f}"
        )
    within = sum(abs(ratio - 1) <= 0.05 for ratio in ratios)
    print(f"{within} of {len(ratios)} within 5%; median {statistics.median(ratios):.3f}, ", end="")
    print(f"lowest {min(ratios):.3f}, highest {max(ratios):.3f}")


if __name__ == "__main__":
    main()
