"""A small training run, alone or as one of several data-parallel ranks, for comparing bits."""

from __future__ import annotations

import torch

from tozan import models
from tozan.comm import Mesh, collectives
from tozan.config.schema import Optim
from tozan.layout import Layout
from tozan.models.arithmetic import Shape
from tozan.optim.adamw import AdamW
from tozan.optim.gradients import clip_factor, gradient_norm, norm_of_sums
from tozan.parallel.data import DataParallel, in_order
from tozan.parallel.zero import Zero

TABLE = Optim(lr=1e-2, clip=0.2)


def shape(family="gpt2", tied=True, width=64, layers=3):
    return Shape(
        family=family,
        layers=layers,
        width=width,
        heads=4,
        kv_heads=4 if family == "gpt2" else 2,
        mlp_width=2 * width,
        vocabulary=96,
        sequence=16,
        tied=tied,
        norm_eps=1e-5,
        rope_base=10000.0,
        dropout=0.0,
    )


def batches(steps, micro_batches):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 96, (steps, micro_batches, 2, 17), generator=generator)


def tokens(batch):
    return batch[..., 1:].numel()


def loss_of(model, micro, total):
    return model(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) / total


def alone(a_shape, steps=3, micro_batches=4, dtype=torch.float32):
    """The reference: (losses, norms, parameters, optimizer tensors) of one process."""
    torch.set_num_threads(1)
    model = models.create(a_shape, 0).to(dtype)
    named = dict(model.named_parameters())
    optimizer = AdamW(named, TABLE)
    losses, norms = [], []
    for step in batches(steps, micro_batches):
        total = 0.0
        for micro in step:
            loss = loss_of(model, micro, tokens(step))
            loss.backward()
            total += loss.item()
        norm = gradient_norm(named)
        optimizer.step(TABLE.lr, clip_factor(norm.value, TABLE.clip))
        optimizer.zero_grad()
        losses.append(total)
        norms.append(norm.value)
    return losses, norms, {n: p.detach() for n, p in named.items()}, optimizer.tensors()


def engine(model, mesh, stage, shards=None, deterministic=True, bucket_bytes=32 << 20):
    axis = mesh["dp"]
    if stage == 0:
        return DataParallel(
            dict(model.named_parameters()), axis, deterministic=deterministic, bucket_bytes=bucket_bytes
        )
    part = mesh.part(axis, shards) if shards else None
    return Zero(model, axis, stage, shards=part, deterministic=deterministic)


def whole(sync, tensors, shapes, axis):
    """Global tensors from every rank's slices, under `<parameter>` or `<slot>/<parameter>`."""
    if isinstance(sync, DataParallel):
        return dict(tensors)
    found = {}
    for key, piece in tensors.items():
        name = key.rpartition("/")[2]
        flat = torch.zeros(shapes[name].numel(), dtype=piece.dtype)
        flat[sync.starts[name] : sync.starts[name] + piece.numel()] = piece.detach()
        summed = collectives.all_reduce(flat, axis, name="whole")
        found[key] = (summed / sync.replica[1]).view(shapes[name])  # copies are two: halving their sum is exact
    return found


def own(sync, tensors):
    """This rank's slices of global tensors, named as in `whole`."""
    names = {key: key.rpartition("/")[2] for key in tensors}
    ends = {key: sync.starts[name] + sync.parameters[name].numel() for key, name in names.items()}
    return {key: tensors[key].reshape(-1)[sync.starts[names[key]] : ends[key]] for key in tensors}


def together(a_shape, size, stage, shards=None, deterministic=True, steps=3, micro_batches=4, options=None):
    """The same run on one of `size` ranks, with what `alone` returns plus the bytes sent."""
    options = dict(options or {})
    dtype, recompute = options.pop("dtype", torch.float32), options.pop("recompute", None)
    mesh = Mesh.create(Layout(dp=size), timeout_s=30)
    axis = mesh["dp"]
    model = models.create(a_shape, 0).to(dtype)
    if recompute:
        from tozan.parallel import recompute as r

        r.apply(model, recompute)
    sync = engine(model, mesh, stage, shards, deterministic, **options)
    optimizer = AdamW(sync.parameters, TABLE, sync.matrices)
    losses, norms = [], []
    for step in batches(steps, micro_batches):
        mine = step[axis.index :: size]
        values = []
        for number, micro in enumerate(mine):
            sync.begin(last=number == len(mine) - 1)
            loss = loss_of(model, micro, tokens(step))
            loss.backward()
            values.append(loss.item())
        sync.finish()
        norm = norm_of_sums(sync.sums_of_squares())
        optimizer.step(TABLE.lr, clip_factor(norm.value, TABLE.clip))
        optimizer.zero_grad()
        sync.publish()
        losses.append(sum(in_order(values, axis)))
        norms.append(norm.value)
    sent = {key: total.bytes for key, total in mesh.ledger.totals.items()}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    parameters = whole(sync, {n: p.detach() for n, p in sync.parameters.items()}, shapes, axis)
    state = whole(sync, optimizer.tensors(), shapes, axis)
    sync.close()
    return losses, norms, parameters, state, sent
