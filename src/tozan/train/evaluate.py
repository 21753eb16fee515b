"""Held-out loss, and models opened from checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tozan import checkpoint, models
from tozan.comm import Axis, collectives
from tozan.data import Dataset, Tokenizer
from tozan.errors import Problem, UserError
from tozan.models.arithmetic import Shape
from tozan.train import machine
from tozan.train.precision import Precision

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The summed loss of inputs and targets, both (B, T): a model, or a pipeline's forward passes."""


@torch.no_grad()
def held_out(
    score: Score,
    data: Dataset,
    samples: int,
    micro_batch: int,
    precision: Precision,
    whole: bool = False,
    replicas: Axis | None = None,
) -> dict[str, float | int]:
    """Mean loss over the first `samples` windows of a split, the same bits however many replicas share the work.

    Args:
        score: of a model in evaluation mode.
        data: the split.
        samples: windows to score, fewer if the split is smaller.
        micro_batch: windows at a time.
        precision: how to compute.
        whole: leave out a last micro-batch that is not full, for layouts that cannot split it.
        replicas: ranks that score micro-batches in turn, all of which call this alike; None for one that is alone.

    Returns:
        `loss` in nats per token, `perplexity` = e^loss, `bits_per_byte` (comparable across tokenizers),
        `tokens` scored and `seconds` taken.
    """
    start = time.perf_counter()
    windows = torch.from_numpy(data.in_order(samples))
    if whole:
        windows = windows[: max(micro_batch, len(windows) - len(windows) % micro_batch)]
    pieces, axis, losses = torch.split(windows, micro_batch), replicas or Axis.single(), []
    for first in range(0, len(pieces), axis.size):
        # Where there are too few for all, the last is scored again and not counted: a forward pass may need all ranks.
        piece = pieces[min(first + axis.index, len(pieces) - 1)].to(precision.device)
        with precision.autocast():
            losses.append(score(piece[:, :-1].contiguous(), piece[:, 1:].contiguous()).item())
    rows = collectives.all_gather(torch.tensor([losses], dtype=torch.float64), axis, name="held-out losses")
    total = sum(rows.T.flatten().tolist()[: len(pieces)])  # in the order of the micro-batches
    tokens = windows[:, 1:].numel()
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss / math.log(2) / data.bytes_per_token,
        "tokens": tokens,
        "seconds": time.perf_counter() - start,
    }


def open_model(path: Path, device: str = "auto") -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
    """The model and tokenizer of a checkpoint (or of a run's newest one), in evaluation mode, and its metadata.

    Raises:
        UserError: there is no checkpoint at `path`, or it is damaged.
    """
    state = checkpoint.load(checkpoint.resolve(path), only="model/")
    if "tokenizer.json" not in state.files:
        raise UserError(
            Problem(str(path), "has no tokenizer.json", "convert the model again from a folder that has one")
        )
    model = models.create(Shape(**state.meta["shape"]), seed=0)
    # Assigned, not copied, so that weights keep their type.
    model.load_state_dict({name.removeprefix("model/"): t for name, t in state.tensors.items()}, assign=True)
    model = model.to(machine.choose_device(device)).eval()
    return model, Tokenizer.load(state.files["tokenizer.json"]), {"step": state.step, **state.meta}


def evaluate(
    path: Path, data: Path | None = None, samples: int = 256, precision: str = "fp32"
) -> dict[str, float | int]:
    """Held-out perplexity of a checkpoint.

    Args:
        path: a run folder or a checkpoint.
        data: a data set folder; default is the one that the checkpoint was trained on.
        samples: held-out windows to score (fewer if the split is smaller).
        precision: compute type, `fp32`, `bf16`, `fp16` or `fp64`.

    Raises:
        UserError: no checkpoint, no data, or data of another tokenizer.
    """
    machine.prepare(threads=0, deterministic=False)
    model, _, meta = open_model(path)
    if data is None and "data" not in meta:
        raise UserError(Problem(str(path), "does not say which data it was trained on", "name a data set with --data"))
    folder = data or Path(meta["data"]["path"])
    split = Dataset.open(
        folder, "validation", sequence=meta["shape"]["sequence"], seed=0, verify="members", on_bad="refuse"
    )
    if meta.get("tokenizer_sha256") not in (None, split.tokenizer_sha256):
        raise UserError(
            Problem(
                str(folder),
                f"has tokenizer {split.tokenizer_sha256[:12]}…, the model was trained with "
                f"{meta['tokenizer_sha256'][:12]}…",
                "build the data with the model's tokenizer: tozan data build … --tokenizer CHECKPOINT/tokenizer.json",
            )
        )
    how = Precision(precision, next(model.parameters()).device)  # type: ignore[arg-type]
    at_once = max(1, 4096 // meta["shape"]["sequence"])
    return {"step": meta["step"], **held_out(model.to(how.weights), split, samples, at_once, how)}
