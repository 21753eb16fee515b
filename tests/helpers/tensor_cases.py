"""What the tests of tensor parallelism share: tiny models, batches, and putting gradients together again."""

import torch
import torch.distributed as dist

from tozan import models
from tozan.models.arithmetic import Shape
from tozan.parallel.apply import counts_here

TOKENS = 8
SAMPLES = 8
SHAPES = {
    "gpt2": Shape("gpt2", 2, 16, 4, 4, 32, 24, TOKENS),
    "gpt2 untied": Shape("gpt2", 1, 16, 4, 4, 32, 24, TOKENS, tied=False),
    "llama": Shape("llama", 2, 16, 4, 2, 24, 24, TOKENS, tied=False),
    "llama tied": Shape("llama", 1, 24, 6, 6, 32, 24, TOKENS),
}


def batch(shape, samples=SAMPLES):
    """Tokens and targets, some of them left out."""
    generator = torch.Generator().manual_seed(3)
    draw = torch.randint(0, shape.vocabulary, (2, samples, shape.sequence), generator=generator)
    draw[1, 0, :3] = -100
    return draw[0], draw[1]


def create(shape, dtype=torch.float64):
    """The whole model, with biases and norms that are not all alike."""
    model = models.create(shape, 1).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def assemble(piece, placement, mesh):
    """The whole tensor from all ranks' pieces, each counted once."""
    whole = torch.zeros(placement.global_shape, dtype=piece.dtype)
    if counts_here(placement, mesh):
        placement.put(piece, whole)
    if mesh.world_size > 1:
        dist.all_reduce(whole)
    return whole


def distance(found, expected):
    """Relative to the size of what is expected."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
