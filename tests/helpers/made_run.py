"""A run folder as the trainer writes it, made from formulas, so that the page can be tested without training."""

import json
import math
import random
from pathlib import Path

SHAPE = {
    "family": "gpt2", "layers": 6, "width": 320, "heads": 5, "kv_heads": 5, "mlp_width": 1280, "vocabulary": 8192,
    "sequence": 256, "tied": True, "norm_eps": 1e-5, "rope_base": 10000.0, "dropout": 0.0,
}  # fmt: skip
CONFIG = """version = 1

[run]
folder = "runs/made"  # run.toml:3

[data]
path = "data"  # run.toml:6
verify = "members"  # default

[train]
steps = {steps}  # --train.steps
precision = "bf16"  # default

[optim]
lr = 0.0006  # default
"""
MANIFEST = {
    "format": "tozan-data",
    "vocabulary": 8192,
    "corpus_sha256": "ab" * 32,
    "splits": {
        "train": {"documents": 1700, "bytes": 19_000_000, "tokens": 5_100_000},
        "validation": {"documents": 90, "bytes": 1_000_000, "tokens": 270_000},
    },
    "licences": {"PSF-2.0": {"documents": 1790, "bytes": 20_000_000, "tokens": 5_370_000}},
    "sources": {"Python 3.11 standard library": {"documents": 1790, "bytes": 20_000_000, "tokens": 5_370_000}},
}


def step_record(step: int, steps: int, noise: random.Random) -> dict[str, object]:
    """A step of 2,048 tokens at about 3,700 tokens/s; step 40 is skipped, as a gradient overflowed."""
    seconds = 0.55 * noise.uniform(0.95, 1.15)
    skipped = "gradient of blocks.3.attn.qkv.weight is inf" if step == 40 else None
    lr = 6e-4 * min(1.0, step / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
    shares = {"data": 0.01, "forward": 0.3, "backward": 0.55, "optimizer": 0.08, "checkpoint": 0.02, "other": 0.04}
    return {
        "kind": "step", "step": step, "tokens": 2048 * step,
        "loss": None if skipped else 4.2 + 4.8 * math.exp(-5 * step / steps) + noise.gauss(0, 0.12),
        "grad_norm": None if skipped else 0.6 + 3 * math.exp(-9 * step / steps) + noise.expovariate(9),
        "lr": lr, "seconds": seconds, "tokens_per_second": 2048 / seconds,
        "model_flops_per_second": 2048 * 6.6e7 / seconds, "mfu": 2048 * 6.6e7 / seconds / 5.2e11,
        "phases": {name: share * seconds for name, share in shares.items()}, "skipped": skipped,
    }  # fmt: skip


def make_run(folder: Path, steps: int = 390) -> Path:
    """Write a run of `steps` steps, killed at two thirds and resumed from the checkpoint before."""
    noise = random.Random(0)
    folder.mkdir(parents=True)
    lines: list[object] = []

    def evaluation(step: int) -> None:
        loss = 4.3 + 4.71 * math.exp(-5 * step / steps)
        lines.append({"kind": "eval", "step": step, "loss": loss, "perplexity": math.exp(loss),
                      "bits_per_byte": loss / 2.6, "tokens": 16384, "seconds": 2.0})  # fmt: skip

    def steps_between(first: int, last: int) -> None:
        for step in range(first, last + 1):
            lines.append(step_record(step, steps, noise))
            if step % max(1, steps // 10) == 0:
                evaluation(step)
            if step % max(1, steps // 5) == 0:
                lines.append({"kind": "event", "step": step, "event": "checkpoint", "text": f"step-{step:08}"})

    evaluation(0)
    saved, killed = 3 * (steps // 5), 2 * steps // 3
    steps_between(1, killed)
    lines.append({"kind": "event", "step": saved, "event": "resumed", "text": f"from step-{saved:08}"})
    steps_between(saved + 1, steps)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "st')
    facts = {
        "parameters": 10_100_480, "shape": SHAPE, "precision": "bf16", "peak_measured_flops": 5.2e11,
        "peak_measured_how": "bf16 matrix products of 2048 × 2048 × 2048, 2 threads, best of 5",
        "machine": {"processor": "Example CPU", "cores": 2, "memory_bytes": 24 * 2**30},
        "versions": {"tozan": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
        "started": "2026-11-23T04:00:00+00:00", "flops_formula": "3 × (2·T·Σ(weights) + 4·L·T²·D) per sample",
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.toml").write_text(CONFIG.format(steps=steps))
    (folder / "sample.txt").write_text('def <b>open</b>(path):\n    """Return the path & the file."""\n' * 12)
    (folder / "data").mkdir()
    (folder / "data" / "manifest.json").write_text(json.dumps(MANIFEST))
    return folder
