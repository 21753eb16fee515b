"""The door between models and tensor parallelism: `apply` replaces a model's layers by sharded ones, in place.

A model says what its layers are (a roles table), a scheme how each role is sharded, `layout.shard` which indices a rank
holds. Parameter names stay, and each parameter's placement says where it belongs in the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType

import torch
from torch import Tensor, nn

from tozan.comm import Mesh, collectives
from tozan.errors import Problem, UserError
from tozan.layout import Layout, shard
from tozan.parallel.placement import Placement
from tozan.parallel.roles import Assigned, assign, indivisible
from tozan.parallel.scheme import Scheme
from tozan.parallel.tensor_1d import Tensor1D
from tozan.parallel.tensor_2d import Tensor2D
from tozan.parallel.tensor_2p5d import Tensor2p5D


def apply(
    model: nn.Module, mesh: Mesh, roles: Mapping[str, str] | None = None, *, sequence: bool = False
) -> dict[str, Placement]:
    """Shard a model over the tensor-parallel axes of a mesh, by the scheme of the mesh's layout.

    Every rank calls it with the same whole model (on the meta device, too; then see `fill`), and keeps its piece of
    each parameter: the same global values in every layout. A model with tozan's `output(x, targets)`, `norm`, `embed`
    and `head` gets an output that never gathers logits; an `nn.Linear` of role `vocab` that a model calls as a layer
    returns all logits. Without tensor parallelism (tp 1) the model stays as it is.

    Args:
        model: changed in place.
        mesh: the ranks.
        roles: patterns of module names to roles (see `roles.py`); the model's own `roles` if None.
        sequence: sequence parallelism (1D only).

    Returns:
        The placement of every parameter, by name.

    Raises:
        UserError: the table or the sizes do not fit; `check` finds the same before there is a mesh.
    """
    table = model.roles if roles is None else roles
    assert isinstance(table, Mapping)
    problems = check(model, mesh.layout, table, sequence=sequence)
    if problems:
        raise UserError(*problems)
    if mesh.layout.tp == 1:
        return {name: Placement.whole(tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    scheme = create(mesh, sequence)
    placements: dict[nn.Parameter, Placement] = {}
    pieces: dict[nn.Parameter, nn.Parameter] = {}
    for layer in assign(model, table)[0]:
        own = {}
        for leaf, parameter in layer.module.named_parameters(recurse=False):
            if parameter not in pieces:
                placement = place(layer, tuple(parameter.shape), mesh, scheme)
                piece = parameter
                if placement.local_shape != placement.global_shape:
                    piece = nn.Parameter(placement.take(parameter.detach()), parameter.requires_grad)
                pieces[parameter] = pieces[piece] = piece
                placements[piece] = placement
            own[leaf] = pieces[parameter]
        _replace(model, layer.name, scheme.layer(layer.role, layer.module, own))
    named = {name: placements[parameter] for name, parameter in model.named_parameters()}
    _bind_output(model, scheme, named)
    return named


def create(mesh: Mesh, sequence: bool = False) -> Scheme:
    """The scheme of a mesh's layout."""
    if mesh.layout.scheme == "1d":
        return Tensor1D(mesh, sequence)
    return Tensor2D(mesh) if mesh.layout.scheme == "2d" else Tensor2p5D(mesh)


def check(model: nn.Module, layout: Layout, roles: Mapping[str, str], *, sequence: bool = False) -> list[Problem]:
    """Everything that keeps a model from being sharded so; needs no ranks, and looks at no values.

    Args:
        model: on any device.
        layout: of the run.
        roles: patterns of module names to roles.
        sequence: whether sequence parallelism is asked for.
    """
    layers, problems = assign(model, roles)
    kinds: dict[str, type[Tensor1D] | type[Tensor2D]] = {"1d": Tensor1D, "2d": Tensor2D, "2.5d": Tensor2p5D}
    for layer in layers:
        wanted = kinds[layout.scheme].accepts(layer.role, layer.module)
        if wanted:
            where = f"{layer.name} (role {layer.role})"
            what = f"is a {type(layer.module).__name__}"
            problems.append(Problem(where, what, f"the {layout.scheme} scheme shards {wanted}"))
        else:
            problems += indivisible(layer, layout)
    if sequence and layout.scheme != "1d":
        what = f"sequence parallelism with the {layout.scheme} scheme, which shards the residual stream already"
        problems.append(Problem("layout", what, "leave it out, or use scheme 1d"))
    spread = layout.tp > 1 and (sequence or layout.scheme != "1d")
    for name, module in model.named_modules():
        if spread and isinstance(module, nn.Dropout) and module.p > 0:
            what = f"dropout {module.p} where ranks hold different tokens: their masks would depend on the layout"
            problems.append(Problem(name, what, "use dropout 0, or scheme 1d without sequence parallelism"))
    return problems


def place(layer: Assigned, shape: tuple[int, ...], mesh: Mesh, scheme: Scheme) -> Placement:
    """The placement of one parameter of a layer on this rank."""
    layout, here = mesh.layout, mesh.layout.coordinates(mesh.rank)
    heads = (layer.units[0], layer.units[1]) if layer.role == "qkv" else None
    indices = shard(layer.role, shape, layout, here, heads)

    def moves(axis: str) -> bool:
        """Whether ranks along an axis hold different pieces."""
        ends = ({**here, axis: index} for index in (0, layout.sizes[axis] - 1))
        first, last = (shard(layer.role, shape, layout, there, heads) for there in ends)
        return first != last

    replicated = tuple(axis for axis in scheme.axes if layout.sizes[axis] > 1 and not moves(axis))
    return Placement(shape, indices, replicated, tuple(axis for axis in replicated if axis in scheme.token_axes))


def fill(model: nn.Module, placements: Mapping[str, Placement], get: Callable[[str, torch.Size], Tensor]) -> None:
    """Give every parameter its piece of a global tensor; one whole tensor exists at a time.

    Args:
        model: after `apply`, on the meta device or a real one.
        placements: what `apply` returned.
        get: the global tensor of a name and global shape: an initial value, or one read from a checkpoint.
    """
    memory: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{leaf}".lstrip(".")
            if id(parameter) not in memory:
                piece = placements[name].take(get(name, torch.Size(placements[name].global_shape)))
                memory[id(parameter)] = nn.Parameter(piece, parameter.requires_grad)
            setattr(module, leaf, memory[id(parameter)])


def synchronize(parameters: Mapping[str, nn.Parameter], placements: Mapping[str, Placement], mesh: Mesh) -> None:
    """Sum those gradients of which each rank has a part: once per step, after the last micro-batch.

    Args:
        parameters: by name, with their gradients.
        placements: what `apply` returned.
        mesh: the ranks.
    """
    together: dict[tuple[tuple[str, ...], torch.dtype], list[Tensor]] = {}
    for name, parameter in sorted(parameters.items()):
        axes = placements[name].partial_over
        if axes and parameter.grad is not None:
            together.setdefault((axes, parameter.grad.dtype), []).append(parameter.grad)
    for (axes, _), gradients in together.items():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        for axis in axes:
            flat = collectives.all_reduce(flat, mesh[axis], name="tp gradients")
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def counts_here(placement: Placement, mesh: Mesh) -> bool:
    """Whether this rank is the one among the holders of a piece that counts it (in a global gradient norm, say)."""
    return all(mesh[axis].index == 0 for axis in placement.replicated_over)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _bind_output(model: nn.Module, scheme: Scheme, placements: Mapping[str, Placement]) -> None:
    """Put the scheme's output in front of the class's own, on models that keep tozan's names."""
    head = "embed.weight" if getattr(model, "head", None) is None else "head.weight"
    normed = isinstance(getattr(model, "norm", None), nn.Module)
    if normed and head in placements and isinstance(getattr(type(model), "output", None), FunctionType):
        vocabulary = placements[head].global_shape[0]
        model.output = partial(_output, model, scheme, vocabulary)  # type: ignore[assignment]


def _output(model: nn.Module, scheme: Scheme, vocabulary: int, x: Tensor, targets: Tensor | None = None) -> Tensor:
    """Logits or summed loss of the residual stream, as the models' own `output`."""
    head = model.embed if model.head is None else model.head
    return scheme.output(model.norm(x), head.weight, targets, vocabulary)  # type: ignore[operator, union-attr, arg-type]
