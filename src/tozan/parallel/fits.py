"""Whether a model fits a layout, from sizes alone: torch-free, and asked before any process group is made.

Every rule gives its arithmetic. A refusal names layouts of the same number of processes that do fit, nearest first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, isqrt, log2
from typing import Literal

from tozan.errors import Problem, UserError
from tozan.layout import Layout, Scheme
from tozan.models.arithmetic import Shape
from tozan.schedules import Name

Zero = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class Request:
    """What is to run on a layout.

    Attributes:
        shape: the model's sizes.
        micro_batch: samples in one forward pass of one data-parallel replica.
        microbatches: forward passes of one step.
        schedule: the pipeline's.
        chunks: pieces of the model per pipeline stage.
        sequence_parallel: whether the 1D scheme shards the residual stream's tokens.
        where: what the problems call the layout: a place in a config file, say.
    """

    shape: Shape
    micro_batch: int
    microbatches: int = 1
    schedule: Name = "1f1b"
    chunks: int = 1
    sequence_parallel: bool = False
    where: str = "layout"


def require(request: Request, layout: Layout, world_size: int | None = None) -> None:
    """Refuses a layout that does not make sense for this model and this number of processes.

    Raises:
        UserError: everything that does not fit, and layouts that do.
    """
    found = problems(request, layout, world_size)
    if found:
        raise UserError(*found)


def problems(request: Request, layout: Layout, world_size: int | None = None) -> list[Problem]:
    """Everything that does not fit, in the order of the axes; the last problem's fix names layouts that do.

    Args:
        request: model, batch and schedule.
        layout: how they are to be split.
        world_size: processes that were started; None if that is not known yet.
    """
    found = list(_findings(request, layout))
    if world_size is not None and layout.world_size != world_size:
        sizes = " × ".join(f"{axis} {getattr(layout, axis)}" for axis in ("pp", "dp", "cp", "tp"))
        found.insert(0, (f"{sizes} = {layout.world_size} processes, but there are {world_size}", ""))
    if not found:
        return []
    near = nearest(request, layout, world_size or layout.world_size)
    fits = "; ".join(describe(candidate) for candidate in near) or "no layout fits this model, batch and world size"
    last = len(found) - 1
    return [
        Problem(request.where, what, "; ".join(filter(None, (fix, f"layouts that fit: {fits}" if i == last else ""))))
        for i, (what, fix) in enumerate(found)
    ]


def nearest(request: Request, layout: Layout, world_size: int, most: int = 3) -> list[Layout]:
    """Layouts of `world_size` processes that fit, those that differ least from `layout` first.

    Distance is the sum over pp, dp, cp and tp of how many doublings they differ by, and one for another scheme.
    """

    def distance(candidate: Layout) -> tuple[float, str]:
        doublings = sum(
            abs(log2(getattr(candidate, axis) / getattr(layout, axis))) for axis in ("pp", "dp", "cp", "tp")
        )
        return doublings + (candidate.scheme != layout.scheme), describe(candidate)

    fitting = (candidate for candidate in candidates(world_size, layout.cp) if not any(_findings(request, candidate)))
    return sorted(fitting, key=distance)[:most]


def candidates(world_size: int, cp: int = 1) -> Iterator[Layout]:
    """Every layout of `world_size` processes whose `cp` divides this one."""
    for context in _divisors(gcd(cp, world_size)):
        for pp in _divisors(world_size // context):
            for tp in _divisors(world_size // context // pp):
                dp = world_size // context // pp // tp
                for scheme, depth in _schemes(tp):
                    yield Layout(pp, dp, context, tp, scheme, depth)


def describe(layout: Layout) -> str:
    """A layout in a few words, such as `pp 2 × dp 1 × tp 4 (2d, 2 × 2)`."""
    axes = [f"{axis} {getattr(layout, axis)}" for axis in ("pp", "dp", "cp", "tp") if getattr(layout, axis) > 1]
    if layout.scheme != "1d":
        sizes = [layout.grid, layout.grid] + ([layout.tp_depth] if layout.scheme == "2.5d" else [])
        axes[-1:] = [f"{axes[-1] if layout.tp > 1 else 'tp 1'} ({layout.scheme}, {' × '.join(map(str, sizes))})"]
    return " × ".join(axes) or "one process"


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _schemes(tp: int) -> Iterator[tuple[Scheme, int]]:
    """Schemes and depths that `tp` ranks can form; one rank needs none but 1D."""
    yield "1d", 1
    for depth in _divisors(tp):
        side = isqrt(tp // depth)
        if side > 1 and side * side * depth == tp:
            yield ("2d", 1) if depth == 1 else ("2.5d", depth)


def _findings(request: Request, layout: Layout) -> Iterator[tuple[str, str]]:
    """(what does not fit, with its arithmetic; what to change)."""
    yield from _tensor(request, layout)
    yield from _sequence(request, layout)
    yield from _pipeline(request, layout)


def _tensor(request: Request, layout: Layout) -> Iterator[tuple[str, str]]:
    """Matrices, heads and samples that do not split over tensor parallelism."""
    shape, columns = request.shape, layout.sizes["tp_col"]
    cuts = [
        ("heads", shape.heads),
        ("kv_heads", shape.kv_heads),
        ("mlp_width", shape.mlp_width),
        ("vocabulary", shape.vocabulary),
    ]
    across = f"tp {layout.tp}" if layout.scheme == "1d" else f"the grid's side {columns} (tp {layout.tp})"
    if layout.scheme != "1d":
        cuts.append(("width", shape.width))
    for name, count in cuts:
        if count % columns:
            yield f"{name} {count} ÷ {across} leaves {count % columns} over", _splits(name, count, columns)
    rows = layout.sizes["tp_row"] * layout.tp_depth
    if request.micro_batch % rows:
        what = f"micro_batch {request.micro_batch} ÷ {rows} grid rows (depth {layout.tp_depth} × side {layout.grid})"
        up = -(-request.micro_batch // rows) * rows
        yield f"{what} leaves {request.micro_batch % rows} samples over", f"micro_batch {up}"
    if shape.dropout and layout.tp > 1 and (layout.scheme != "1d" or request.sequence_parallel):
        how = f"scheme {layout.scheme}" if layout.scheme != "1d" else "sequence parallelism"
        yield f"dropout {shape.dropout} with {how}: the masks would depend on the layout", "dropout 0"


def _splits(name: str, count: int, parts: int) -> str:
    """What to write instead: a size that splits, or ways in which this one does."""
    if name == "vocabulary":
        return f"vocabulary {-(-count // parts) * parts}"
    return f"{count} splits by {', '.join(map(str, _divisors(count)[:8]))}"


def _sequence(request: Request, layout: Layout) -> Iterator[tuple[str, str]]:
    """Sequences that do not split over sequence or context parallelism."""
    tokens = request.shape.sequence
    if request.sequence_parallel and layout.scheme != "1d":
        what = f"sequence parallelism with scheme {layout.scheme}, which shards the residual stream already"
        yield what, "leave it out, or use scheme 1d"
    elif request.sequence_parallel and tokens % (layout.tp * layout.cp):
        rest = tokens % (layout.tp * layout.cp)
        what = f"sequence {tokens} ÷ (tp {layout.tp} × cp {layout.cp}) leaves {rest} tokens over"
        yield what, f"sequence {tokens - rest}" if tokens > rest else ""
    if layout.cp > 1 and tokens % (2 * layout.cp):
        what = f"sequence {tokens} ÷ (2 × cp {layout.cp}) leaves {tokens % (2 * layout.cp)} tokens over"
        up = -(-tokens // (2 * layout.cp)) * 2 * layout.cp
        yield f"{what} (each rank holds a piece from either end)", f"sequence {up}"
    if layout.cp > 1 and layout.scheme != "1d":
        yield f"cp {layout.cp} with scheme {layout.scheme}, whose attention keeps whole sequences", "use scheme 1d"
    if layout.cp > 1 and request.shape.dropout:
        yield f"dropout {request.shape.dropout} with cp {layout.cp}: the masks would depend on the layout", "dropout 0"


def _pipeline(request: Request, layout: Layout) -> Iterator[tuple[str, str]]:
    """Layers and micro-batches that cannot fill a pipeline."""
    layers, parts = request.shape.layers, layout.pp * request.chunks
    if layers < parts:
        what = f"pp {layout.pp} × chunks {request.chunks} = {parts} pieces of a model of {layers} layers"
        yield what, f"at most {layers} pieces"
    if request.chunks > 1 and request.schedule != "interleaved":
        yield f"chunks {request.chunks} with schedule {request.schedule}", "only interleaved takes more than 1"
    if request.chunks > 1 and layout.pp == 1:
        yield f"chunks {request.chunks} with pp 1: there is no pipeline to interleave", "chunks 1"
    if request.schedule == "interleaved" and request.chunks > 1 and request.microbatches % layout.pp:
        rest = request.microbatches % layout.pp
        what = f"interleaved: {request.microbatches} micro-batches ÷ pp {layout.pp} leaves {rest} over"
        yield what, f"{request.microbatches - rest or layout.pp} micro-batches"
    if layout.pp > 1 and request.shape.dropout:
        yield f"dropout {request.shape.dropout} with pp {layout.pp}: the masks would depend on the layout", "dropout 0"
