"""One side of `single_node.py`: a process that trains a model and takes a step whenever a line arrives.

    python benchmarks/loops.py NAME SPEC.json

The loops of the peers are what their users write: forward under autocast, backward, clipping, fused AdamW. They import
nothing of tozan, so that their processes have the allocator and the threads that the peer comes with.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Spec = dict[str, Any]
"""The model's sizes (`shape`, as in tozan.models.arithmetic.Shape) and how to train it; see `single_node.specify`."""


class Block(nn.Module):
    """A block of GPT-2 as it is written by hand."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(d, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class GPT2(nn.Module):
    """GPT-2 in plain PyTorch, in the style of nanoGPT; called with tokens and targets it returns their mean loss."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, sequence: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(sequence, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def pytorch(shape: Spec) -> tuple[nn.Module, Loss]:
    """Plain PyTorch."""
    if shape["family"] != "gpt2":
        raise SystemExit("the plain PyTorch peer is a GPT-2")
    model = GPT2(*(shape[size] for size in ("layers", "width", "heads", "vocabulary", "sequence")))
    return model, lambda forward, tokens, targets: forward(tokens, targets)


def transformers(shape: Spec) -> tuple[nn.Module, Loss]:
    """The models of the transformers package. They shift labels by themselves, so that one token less has a target."""
    import transformers

    if shape["family"] == "gpt2":
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        sizes = {"n_positions": shape["sequence"], "n_embd": shape["width"], "n_layer": shape["layers"]}
        sizes |= {"vocab_size": shape["vocabulary"], "n_head": shape["heads"]}
        config = transformers.GPT2Config(**sizes, **dropouts, use_cache=False)
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=shape["vocabulary"],
            hidden_size=shape["width"],
            intermediate_size=shape["mlp_width"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            max_position_embeddings=shape["sequence"],
            tie_word_embeddings=shape["tied"],
            use_cache=False,
        )
        model = transformers.LlamaForCausalLM(config)
    return model.train(), lambda forward, tokens, _: forward(input_ids=tokens, labels=tokens).loss


def litgpt(shape: Spec) -> tuple[nn.Module, Loss]:
    """litgpt's model, which has rotary positions and a head of its own in every family."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    llama = shape["family"] == "llama"
    kind = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "rotary_percentage": 1.0} if llama else {}
    config = Config(
        block_size=shape["sequence"],
        padded_vocab_size=shape["vocabulary"],
        vocab_size=shape["vocabulary"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_embd=shape["width"],
        n_query_groups=shape["kv_heads"],
        intermediate_size=shape["mlp_width"],
        bias=not llama,
        parallel_residual=False,
        gelu_approximate="tanh",
        **kind,
    )
    return GPT(config), lambda forward, tokens, targets: chunked_cross_entropy(forward(tokens), targets, chunk_size=0)


PEERS = {"pytorch": pytorch, "transformers": transformers, "litgpt": litgpt}


def peer_step(name: str, spec: Spec) -> Callable[[], tuple[int, float]]:
    """A step of a peer: returns its tokens and its loss."""
    torch.manual_seed(0)
    torch.set_num_threads(spec["threads"])
    device = spec["device"]
    model, loss_of = PEERS[name](spec["shape"])
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if spec["compiled"] else model
    batches = iter(np.load(spec["batches"], mmap_mode="r"))
    bf16 = spec["precision"] == "bf16"

    def step() -> tuple[int, float]:
        batch = torch.from_numpy(np.array(next(batches))).to(device)
        tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(forward, tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return tokens.numel(), loss.item()

    return step


def tozan_step(flags: list[str]) -> tuple[Callable[[], tuple[int, float]], float]:
    """A step of a run that `tozan train` would assemble from these flags, and the best product's FLOP/s."""
    from tozan.config import load
    from tozan.train import assemble
    from tozan.train.clock import Clock
    from tozan.train.step import train_step

    run = assemble(load(None, flags))
    clock = Clock(run.device)

    def step() -> tuple[int, float]:
        while (result := train_step(run, clock)).again:
            pass  # it looked odd, and nothing was updated
        clock.lap()
        run.step, run.samples = run.step + 1, run.samples + run.global_batch
        return result.tokens, result.loss

    return step, run.peak_flops


def main(name: str, spec: Spec) -> None:
    """Say that all is ready, then answer each line with a step's seconds, tokens and loss."""
    peak = None
    if name == "tozan":
        step, peak = tozan_step(spec["flags"])
    else:
        step = peer_step(name, spec)
    print(json.dumps({"peak_flops": peak, "torch": torch.__version__}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        tokens, loss = step()
        answer = {"seconds": time.perf_counter() - begin, "tokens": tokens, "loss": loss}
        if spec["device"] == "cuda":
            answer["gpu_memory"] = torch.cuda.max_memory_allocated()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
