"""Text from a model, a token at a time, with a key/value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from tozan.errors import Problem, UserError
from tozan.models.arithmetic import Shape
from tozan.models.gpt2 import GPT2
from tozan.models.layers import Cache
from tozan.models.llama import Llama


def generate(
    model: nn.Module,
    tokens: Tensor,
    max_new: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Collection[int] | None = None,
) -> Iterator[Tensor]:
    """Continues a batch of prompts.

    The model sees at most its last `shape.sequence` tokens: of a longer prompt only the end is read, and when the
    context is full it starts anew from its second half (learned positions cannot slide, so that the cache has to be
    made again; halving makes this rare).

    Args:
        model: a `GPT2` or `Llama`; dropout is switched off while this runs.
        tokens: (B, T) int64 prompts of equal length.
        max_new: most tokens to add.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest most likely tokens whose probabilities sum to at least this (arXiv 1904.09751).
        seed: seed of the sampling; it and the inputs decide the text.
        stop: token ids that end a sample. A finished sample repeats its stop token while others go on.

    Returns:
        An iterator over (B,) int64, the next token of every sample; it ends early when all samples have stopped.

    Raises:
        UserError: a prompt that is empty or has ids outside the vocabulary, or a sampling option out of range.
    """
    network = cast(GPT2 | Llama, model)
    problems = _problems(network.shape, tokens, max_new, temperature, top_k, top_p)
    if problems:
        raise UserError(*problems)
    return _generate(network, tokens, max_new, temperature, top_k, top_p, seed, frozenset(stop or ()))


def _problems(
    shape: Shape, tokens: Tensor, max_new: int, temperature: float, top_k: int | None, top_p: float | None
) -> list[Problem]:
    """Everything wrong with a request, each with what to give instead."""
    found = []
    if tokens.ndim != 2 or tokens.numel() == 0:
        size = " × ".join(map(str, tokens.shape))
        found.append(
            Problem("prompt", f"has size {size}; needs samples × tokens, at least one of each", "write a prompt")
        )
    elif int(tokens.min()) < 0 or int(tokens.max()) >= shape.vocabulary:
        what = f"token ids {int(tokens.min())} to {int(tokens.max())} leave the vocabulary, 0 to {shape.vocabulary - 1}"
        found.append(Problem("prompt", what, "use the tokenizer that the model was trained with"))
    if max_new < 0:
        found.append(Problem("max_new", f"{max_new} is below 0", "give the number of tokens to add"))
    if not 0.0 <= temperature < float("inf"):
        found.append(Problem("temperature", f"{temperature} is not a number from 0 up", "0 for greedy, 1 to sample"))
    if top_k is not None and top_k < 1:
        found.append(Problem("top_k", f"{top_k} is below 1", "give a number of tokens, or leave it out"))
    if top_p is not None and not 0.0 < top_p <= 1.0:
        found.append(Problem("top_p", f"{top_p} is not above 0 and at most 1", "0.9 is common; leave it out for all"))
    return found


def _generate(
    model: GPT2 | Llama,
    tokens: Tensor,
    max_new: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop: frozenset[int],
) -> Iterator[Tensor]:
    """`generate` after its checks; each step works without gradients, and nothing is switched between steps."""
    generator = torch.Generator().manual_seed(seed)
    stops = torch.tensor(sorted(stop), dtype=torch.int64)
    context, device = tokens.cpu(), next(model.parameters()).device
    window = model.shape.sequence
    cache, unseen = None, context[:, -window:]
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool)
    for _ in range(max_new):
        if cache is None or cache.length + unseen.shape[1] > window:
            unseen = context[:, -window:] if cache is None else context[:, -max(1, window // 2) :]
            cache = Cache(model.shape.layers, window)
        following = _pick(_next_logits(model, unseen.to(device), cache), temperature, top_k, top_p, generator)
        following = following.where(~finished, context[:, -1])
        finished |= torch.isin(following, stops)
        context = torch.cat((context, following[:, None]), dim=1)
        unseen = following[:, None]
        yield following
        if bool(finished.all()):
            return


@torch.no_grad()
def _next_logits(model: GPT2 | Llama, unseen: Tensor, cache: Cache) -> Tensor:
    """Logits (B, V), fp32 on the CPU, of the token after `unseen` (B, T); the model's mode is put back."""
    training = model.training
    model.eval()
    try:
        last = model.hidden(unseen, cache)[:, -1:]
        return model.output(last)[:, 0].float().cpu()
    finally:
        model.train(training)


def _pick(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """Chooses a token (B,) from logits (B, V)."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    p = torch.softmax(logits / temperature, dim=-1)
    if top_k is not None or top_p is not None:
        p, order = p.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            p[:, top_k:] = 0.0
        if top_p is not None:
            # Mass of the tokens before this one: the first is kept always.
            p[p.cumsum(dim=-1) - p >= top_p * p.sum(dim=-1, keepdim=True)] = 0.0
        return order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]
    return torch.multinomial(p, 1, generator=generator)[:, 0]
