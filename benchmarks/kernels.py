"""Compiled kernels beside plain PyTorch, alternating; then what of a step is no matrix product.

    python benchmarks/kernels.py                   # each operation, one thread: seconds
    python benchmarks/kernels.py --step            # and torch's profiler over a step of GPT-2 124M, with and without

Operations are timed by the CPU time of their thread, the least of many counts: a loaded machine disturbs that little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import standard_text
from loops import tozan_step

from tozan.ops import (
    adamw,
    causal_attention,
    checksums,
    cross_entropy,
    gelu,
    layer_norm,
    native,
    rms_norm,
    rotate,
    swiglu,
)
from tozan.ops.update import Rates

PRODUCTS = {"tozan::product", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
ATTENTION = {"tozan::attention", "tozan::attention_backward"}
"""Products with softmax between them: what a kernel does of each cannot be seen from outside."""


def compare(name: str, work: Callable[[], object], repeats: int = 15) -> None:
    """Prints the milliseconds of both and their ratio."""
    best = {"plain": float("inf"), "auto": float("inf")}
    for number in range(repeats):
        for choice in sorted(best, reverse=number % 2 == 1):
            native.choose(choice)  # type: ignore[arg-type]
            start = time.thread_time()
            work()
            best[choice] = min(best[choice], time.thread_time() - start)
    plain, compiled = best["plain"] * 1e3, best["auto"] * 1e3
    print(f"{name:44} {plain:8.2f} ms {compiled:8.2f} ms {plain / compiled:6.2f}×", flush=True)


def operations() -> None:
    """GPT-2 124M's shapes, 512 tokens of them, in bf16."""
    torch.manual_seed(0)
    x, up, dy = (torch.randn(512, 3072).bfloat16().requires_grad_() for _ in range(3))
    with torch.no_grad():
        compare("GELU", lambda: gelu(x))
        compare("SwiGLU", lambda: swiglu(x, up))
    compare("GELU and its gradient", lambda: torch.autograd.grad(gelu(x), x, dy))
    compare("SwiGLU and its gradients", lambda: torch.autograd.grad(swiglu(x, up), (x, up), dy))
    stream, norm_dy = torch.randn(512, 768, requires_grad=True), torch.randn(512, 768).bfloat16()
    weight, bias = torch.ones(768, requires_grad=True), torch.zeros(768, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        given = (stream, weight, bias)
        compare("LayerNorm and its gradients", lambda: torch.autograd.grad(layer_norm(*given, 1e-5), given, norm_dy))
        given = (stream, weight)
        compare("RMSNorm and its gradients", lambda: torch.autograd.grad(rms_norm(*given, 1e-5), given, norm_dy))
    logits = torch.randn(64, 50_304).bfloat16()
    targets, loss = torch.randint(0, 50_304, (64,)), torch.empty(64)
    compare("cross-entropy and its gradient", lambda: cross_entropy._losses(logits, targets, loss, logits.dtype))
    packed, angles = torch.randn(1, 1024, 36, 64).bfloat16().requires_grad_(), torch.rand(1024, 32)
    turned = (packed, angles.cos(), angles.sin(), 24)
    arriving = torch.randn(packed.shape).bfloat16()
    compare("rotary positions and their gradient", lambda: torch.autograd.grad(rotate(*turned), packed, arriving))
    q, k, v = torch.split(packed.transpose(1, 2), [12, 12, 12], dim=1)
    with torch.no_grad():
        compare("attention", lambda: causal_attention(q, k, v))
    arriving = torch.randn(q.shape).bfloat16()
    compare("attention and its gradients", lambda: torch.autograd.grad(causal_attention(q, k, v), (q, k, v), arriving))
    state = [[torch.rand(1 << 24) + 1e-3] for _ in range(4)]
    tensors = [group[0] for group in (state[0], *state[2:])]
    rates = Rates(lr=1e-9, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1, updates=10, scale=0.999)
    compare("AdamW with scaling and checksums", lambda: adamw(*state, rates) or checksums(tensors))


def profile(choice: native.Choice, step: Callable[[], object]) -> None:
    """Prints what share of a step is no matrix product, and where it goes."""
    native.choose(choice)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    rows = sorted(((event.self_cpu_time_total / 1e3, event.key) for event in found.key_averages()), reverse=True)
    total = sum(took for took, _ in rows)
    others = [(took, name) for took, name in rows if name not in PRODUCTS | ATTENTION]
    attention = sum(took for took, name in rows if name in ATTENTION)
    print(f"\nkernels {choice}: {total:.0f} ms, {sum(took for took, _ in others) / total:.1%} no product", end="")
    print(f", {attention / total:.1%} attention's kernel" if attention else "")
    for took, name in others[:14]:
        print(f"{took:9.1f} ms {took / total:6.1%} {name}")


def flags(folder: Path, options: argparse.Namespace) -> list[str]:
    """Those of the run whose steps are profiled."""
    given = {
        "version": 1,
        "model.preset": options.preset,
        "data.path": standard_text(folder),
        "run.folder": folder / "run",
        "train.steps": 100,
        "train.micro_batch": options.micro_batch,
        "train.accumulate": 1,
        "train.precision": options.precision,
        "train.threads": options.threads,
    }
    return [f"--{name}={value}" for name, value in given.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", action="store_true", help="also profile whole steps")
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{native.status()}\n{'':44} {'plain':>11} {'compiled':>11}")
    operations()
    if options.step:
        with tempfile.TemporaryDirectory() as folder:
            step, _ = tozan_step(flags(Path(folder), options))
            profile("plain", step)
            profile("auto", step)


if __name__ == "__main__":
    main()
