"""How this process holds its part of the model: cut by pipeline stage, sharded by tensor scheme, shared by replicas.

One process is the layout 1 × 1 × 1 of the same code: nothing is replaced, nothing is sent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tozan import layout, models, schedules
from tozan.checkpoint import Pieces
from tozan.comm import Axis, Mesh, collectives
from tozan.config import Config
from tozan.models.arithmetic import Shape, hardware_flops
from tozan.models.layers import initial
from tozan.ops import native
from tozan.optim.gradients import GradientNorm, norm_of_sums
from tozan.parallel import apply as tensor
from tozan.parallel import context, fits, pipeline, recompute
from tozan.parallel.data import DataParallel
from tozan.parallel.placement import Placement
from tozan.parallel.zero import Zero
from tozan.train import pieces
from tozan.train.precision import Precision


class Sync(Protocol):
    """What `DataParallel` and `Zero` have in common: they make replicas one."""

    parameters: dict[str, nn.Parameter]
    matrices: set[str]
    resting: dict[str, nn.Parameter]
    whole_at_rest: bool
    whole_state: bool
    starts: dict[str, int]
    replica: tuple[int, int]

    def begin(self, last: bool) -> None: ...  # noqa: D102
    def hand_over(self, names: Collection[str], last: bool) -> None: ...  # noqa: D102
    def finish(self) -> None: ...  # noqa: D102
    def sums_of_squares(self) -> dict[str, float]: ...  # noqa: D102
    def publish(self) -> None: ...  # noqa: D102
    def witness(self, on: bool) -> int | None: ...  # noqa: D102


def mesh_layout(config: Config) -> layout.Layout:
    """The mesh axes of a config's `[layout]`.

    Raises:
        UserError: sizes that form no grid.
    """
    table = config.layout
    sizes = {"pp": table.pipeline, "dp": table.data, "cp": table.context, "tp": table.tensor}
    return layout.Layout(**sizes, scheme=table.scheme, tp_depth=table.depth)


def require_fit(config: Config, shape: Shape, origin: str) -> None:
    """Refuse a layout that this model and batch cannot have, before any process group is made.

    Args:
        config: the run.
        shape: its model.
        origin: where the layout was written.

    Raises:
        UserError: all that does not fit, with the layouts of as many processes that would.
    """
    table, train = config.layout, config.train
    request = fits.Request(
        shape=shape,
        micro_batch=train.micro_batch or 1,
        microbatches=train.accumulate or 1,
        schedule=table.schedule,
        chunks=table.chunks,
        sequence_parallel=table.sequence_parallel,
        where=origin,
    )
    fits.require(request, mesh_layout(config))


@dataclass
class Split:
    """This process's part of the model, and how it becomes whole.

    Attributes:
        mesh: the ranks.
        model: this process's part, with the global parameter names.
        placements: where each parameter of this part belongs in the whole.
        sizes: global size of every parameter of the whole model, in its order.
        sync: makes replicas one; holds what the optimizer steps.
        stage: runs the pipeline's schedule; None without a pipeline.
    """

    mesh: Mesh
    model: nn.Module
    placements: dict[str, Placement]
    sizes: dict[str, torch.Size]
    sync: Sync
    stage: pipeline.Pipeline | None

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.mesh.world_size == 1

    @property
    def replicas(self) -> Axis:
        """The ranks whose gradients and losses add up: those with other samples, and those with other tokens."""
        return _replicas(self.mesh)

    def own_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens of whole sequences (B, T): all of them, without context parallelism."""
        axis = self.mesh["cp"]
        return x if axis.size == 1 else x[:, context.own_tokens(x.shape[1], axis).to(x.device)]

    def score(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The summed loss of whole sequences, both (B, T), by forward passes only; alike on all ranks of a replica."""
        x, y = self.own_tokens(inputs), self.own_tokens(targets)
        loss = self.stage.evaluate([x], [y])[0] if self.stage else self.model(x, y)
        return collectives.all_reduce(loss.clone(), self.mesh["cp"], name="held-out loss", ordered=True)

    @property
    def model_axes(self) -> bool:
        """Whether the model itself is cut or sharded, beside being copied."""
        return self.mesh.layout.pp * self.mesh.layout.tp > 1

    def gradient_norm(self, scale: float) -> GradientNorm:
        """The global norm of the gradients divided by `scale`, after `sync.finish`; the same on every rank."""
        if not self.model_axes:
            return norm_of_sums(self.sync.sums_of_squares(), scale)
        tensor.synchronize(self.sync.parameters, self.placements, self.mesh)
        return norm_of_sums(self._everyones(self.sync.sums_of_squares()), scale)

    def _everyones(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sums of squares of the whole model, from those of every rank's pieces; each piece counts once."""
        row = torch.zeros(len(self.sizes), dtype=torch.float64)
        for number, name in enumerate(self.sizes):
            if name in sums and tensor.counts_here(self.placements[name], self.mesh):
                row[number] = sums[name]
        row = collectives.all_reduce(row, self.mesh.joined("pp", "tp"), name="gradient norm")
        return dict(zip(self.sizes, row.tolist(), strict=True))

    def held(self, tensors: Mapping[str, Tensor]) -> dict[str, Pieces]:
        """Where this rank's tensors, by parameter, belong in the global ones: all boxes that it holds."""
        return pieces.held(tensors, self.sync.starts, self.placements)

    def shared_out(self, tensors: Mapping[str, Tensor]) -> dict[str, Pieces]:
        """The boxes that fall to this rank so that all ranks together have each element of the global tensors once."""
        replicas = {name: pieces.replica(self.placements[name], self.mesh, self.sync.replica) for name in tensors}
        numbers = {name: number for number, name in enumerate(self.sizes)}
        return pieces.shared_out(tensors, self.sync.starts, self.placements, replicas, numbers)


def recompute_of(config: Config) -> list[recompute.Mode]:
    """What every pipeline stage recomputes."""
    return list(config.train.recompute_stages) or [config.train.recompute] * config.layout.pipeline


def executed_flops(config: Config, shape: Shape) -> float:
    """FLOPs that training one sample executes, with the recomputation of every pipeline stage."""
    table = config.layout
    stages = layout.split_layers(shape.layers, table.pipeline, table.chunks, table.split)
    words = zip(stages, recompute_of(config), strict=True)
    return sum(sum(map(len, held)) * hardware_flops(shape, word) for held, word in words) / shape.layers


def compiled(config: Config, device: torch.device) -> bool:
    """Whether the model's blocks are compiled by torch.compile."""
    if config.train.compile is not None:
        return config.train.compile
    fits = config.layout.zero < 3 and config.train.kernels == "auto"
    return fits and device.type == "cuda" and native.compiles_for_gpu()


def _replicas(mesh: Mesh) -> Axis:
    return mesh.joined("dp", "cp") if mesh["cp"].size > 1 else mesh["dp"]


def build(config: Config, shape: Shape, mesh: Mesh, device: torch.device, precision: Precision) -> Split:
    """Build this rank's part of the model with its initial values, and what connects it to the others.

    Raises:
        UserError: the layout asks for what a part cannot have.
    """
    model: nn.Module = models.skeleton(shape)
    sizes = {name: p.shape for name, p in model.named_parameters()}
    table = config.layout
    placements = {name: Placement.whole(tuple(size)) for name, size in sizes.items()}
    if table.tensor > 1:
        placements = tensor.apply(model, mesh, sequence=table.sequence_parallel)
    part = None
    if table.pipeline > 1:
        layers = layout.split_layers(shape.layers, table.pipeline, table.chunks, table.split)
        part = pipeline.cut(model, layers, mesh["pp"].index)
    tensor.fill(model, placements, lambda name, size: initial(shape, name, size, config.train.seed))
    model.to(device, precision.weights)
    context.apply(model, mesh["cp"], shape.sequence)
    recompute.apply(model, recompute_of(config)[mesh["pp"].index])
    if compiled(config, device):
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile()
    stage = _stage(config, shape, model, part, mesh, precision) if part else None
    if stage:
        placements = stage.share(placements)
    held = {name: placements[name] for name, _ in model.named_parameters()}
    return Split(mesh, model, held, sizes, _sync(config, model, mesh, stage), stage)


def _stage(
    config: Config, shape: Shape, model: nn.Module, part: pipeline.Part, mesh: Mesh, precision: Precision
) -> pipeline.Pipeline:
    """The engine of this pipeline stage."""
    table = config.layout
    schedule = schedules.create(table.schedule, table.pipeline, config.train.accumulate or 1, table.chunks)
    scheme = tensor.create(mesh, table.sequence_parallel)

    def local_shape(batch: int, tokens: int) -> tuple[int, ...]:
        return scheme.local_shape(batch, tokens, shape.width)

    return pipeline.Pipeline(model, part, mesh["pp"], schedule, local_shape, precision.autocast)


def _sync(config: Config, model: nn.Module, mesh: Mesh, stage: pipeline.Pipeline | None) -> Sync:
    """What makes replicas one: plain data parallelism, or a stage of ZeRO."""
    table, axis, deterministic = config.layout, _replicas(mesh), config.train.deterministic
    hands_over = stage is not None and axis.size > 1 and (deterministic or table.zero >= 2)
    relays = stage.relays() if stage and hands_over else None
    sync: DataParallel | Zero
    if table.zero == 0 or axis.size == 1:
        groups = stage.groups() if stage and hands_over else None
        named = dict(model.named_parameters())
        sync = DataParallel(named, axis, deterministic=deterministic, groups=groups, relays=relays)
    else:
        shards = mesh.part(axis, table.zero_group) if table.zero_group else None
        sync = Zero(model, axis, table.zero, shards=shards, deterministic=deterministic, relays=relays)
    if stage and hands_over:
        stage.hand_over = sync.hand_over
    return sync
