"""The rate of every matrix product of a training step: forward and both gradients, by precision, threads and split.

Operands are random (matrix units run faster on zeros), and each product is called as the trainer calls it:
`ops.product` of x and wᵀ forward, of dy and w for the input's gradient, of dyᵀ and x for the weight's; `torch.bmm` in
attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from tozan.amounts import many, percent, scaled
from tozan.bench import measure
from tozan.bench.result import Peak, Result, Row
from tozan.bench.show import foot, head, table
from tozan.comm import processor
from tozan.errors import Problem, UserError
from tozan.models.arithmetic import Shape
from tozan.models.products import Product, other_flops, products
from tozan.ops import causal_attention, fused
from tozan.ops.attention import BLOCKED_FROM, query_blocks
from tozan.ops.cross_entropy import chunk_tokens
from tozan.ops.products import product, usable
from tozan.planner.sizes import find_shape
from tozan.train import machine

FUGAKU = Shape("gpt2", 1, 7168, 56, 56, 28672, 51200, 2048)
"""One layer of the GPT of the talk that tozan grew from: 7168 wide, 56 heads, 2,048 tokens."""
FUGAKU_SPLITS = (1, 2, 4, 8, 16, 32)
ATTENTION = ("attn.scores", "attn.values")


@dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
        model: a preset, a config, a size such as 13B, or `fugaku`.
        micro_batch: samples in one forward pass.
        tensor: ranks that share the matrices, each a measurement of its own.
        precisions: compute types.
        threads: thread counts.
        seconds: at each product, at least.
        repeats: at each product, at least.
    """

    model: str
    micro_batch: int
    tensor: tuple[int, ...]
    precisions: tuple[str, ...]
    threads: tuple[int, ...]
    seconds: float = 0.2
    repeats: int = 6

    @property
    def shape(self) -> Shape:
        """The model's sizes; a UserError if there is no such model."""
        return FUGAKU if self.model == "fugaku" else find_shape(self.model)


def work(
    model: str,
    micro_batch: int | None,
    tensor: tuple[int, ...] | None,
    precisions: tuple[str, ...],
    threads: tuple[int, ...] | None,
    seconds: float = 0.2,
    repeats: int = 6,
) -> Work:
    """Fill in what was left out: about 4,096 tokens, no split (fugaku: 1 to 32), one thread and all cores."""
    fugaku = model == "fugaku"
    everything = tuple(sorted({1, processor.cores()}))
    found = Work(
        model,
        micro_batch or 1,
        tensor or (FUGAKU_SPLITS if fugaku else (1,)),
        precisions,
        threads or everything,
        seconds,
        repeats,
    )
    return found if micro_batch or fugaku else replace(found, micro_batch=default_micro_batch(found.shape))


def run(work: Work) -> Result:
    """Measure every product.

    Raises:
        UserError: no such model, or it cannot be split so.
    """
    machine.prepare(None, deterministic=False)
    rows: list[Row] = []
    peaks: dict[str, Peak] = {}
    for precision, threads in itertools.product(work.precisions, work.threads):
        with measure.threads(threads):
            peak = measure.peaks([precision])[precision]
            found = [(tensor, *one) for tensor in work.tensor for one in _rates(work, tensor, precision)]
        best = max([peak.measured, *(max(rates) for *_, rates in found)])
        peak = peak.model_copy(update={"measured": best})
        rows += [_row(one, share, rates, precision, threads, tensor, peak) for tensor, one, share, rates in found]
        if threads == max(work.threads):
            peaks[precision] = peak
    with measure.threads(max(work.threads)):
        bandwidth = median(measure.copy_rates(work.seconds))
    return measure.made("gemm", rows, vars(work), peaks=peaks, bandwidth=bandwidth, notes=_notes(work))


def step_products(
    shape: Shape, dtype: torch.dtype, micro_batch: int, micro_batches: int = 1, tensor: int = 1
) -> list[Product]:
    """The products of a step as the trainer executes them: attention by blocks of queries, the head in chunks.

    Where attention is PyTorch's own kernel (short samples, fp16), the blocks stand for what happens inside it. tozan's
    kernel is one product for each of those it makes, over as many keys as its queries see on average.
    """
    long = shape.sequence >= BLOCKED_FROM
    ours = long and fused.usable(torch.empty(1, 1, 1, shape.head_size, dtype=dtype))
    blocked = long and not ours and dtype == torch.bfloat16
    blocks = [(end - first, end) for first, end in query_blocks(shape.sequence)]
    try:
        return products(
            shape,
            micro_batch,
            micro_batches,
            tensor,
            query_blocks=[(shape.sequence, fused.mean_keys(shape.sequence))] if ours else blocks,
            attention_samples=1 if blocked else None,
            head_tokens=chunk_tokens(micro_batch * shape.sequence, shape.vocabulary // tensor),
        )
    except ValueError as error:
        raise UserError(Problem("--tensor", str(error), "choose a divisor")) from None


def default_micro_batch(shape: Shape) -> int:
    """Samples of about 4,096 tokens, as `tozan train` takes them by default."""
    return max(1, 4096 // shape.sequence)


def timed(one: Product, dtype: torch.dtype, seconds: float, repeats: int) -> list[float]:
    """Seconds of each repeat of a product."""
    return measure.times(call(one, dtype), seconds, repeats)


def call(one: Product, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A product on random operands that lie in memory as the trainer's do."""
    generator = torch.Generator().manual_seed(0)

    def operand(rows: int, columns: int) -> Tensor:
        size = (rows, columns) if one.batch == 1 else (one.batch, rows, columns)
        return torch.randn(size, generator=generator).to(dtype)

    if one.form == "nt":
        a, b = operand(one.m, one.k), operand(one.n, one.k).transpose(-2, -1)
    elif one.form == "nn":
        a, b = operand(one.m, one.k), operand(one.k, one.n)
    else:
        a, b = operand(one.k, one.m).transpose(-2, -1), operand(one.k, one.n)
    if one.batch > 1:
        return lambda: torch.bmm(a, b)
    tokens, result = (one.k, torch.float32) if one.form == "tn" else (one.m, dtype)
    if usable(dtype, tokens, a, b):  # then fp32 weights are taken as they are, and their gradients made in fp32
        b = b if one.form == "tn" else b.float()
        return lambda: product(a, b, dtype, result, rows=tokens)
    return lambda: torch.mm(a, b)


def attention_seconds(
    shape: Shape, micro_batch: int, dtype: torch.dtype, tensor: int, seconds: float, repeats: int
) -> dict[str, list[float]]:
    """Seconds of one layer's attention `forward` and `backward` by tozan's kernel; empty where the trainer has none."""
    kv_heads, group = -(-shape.kv_heads // tensor), shape.heads // shape.kv_heads
    size = (micro_batch, shape.sequence, (group + 2) * kv_heads, shape.head_size)
    heads = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2)
    parts = [part.detach() for part in torch.split(heads, [group * kv_heads, kv_heads, kv_heads], dim=1)]
    if shape.sequence < BLOCKED_FROM or not fused.usable(parts[0]):
        return {}
    ahead = measure.times(lambda: causal_attention(*parts), seconds, repeats)
    parts = [part.requires_grad_() for part in parts]
    y = causal_attention(*parts)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    back = measure.times(lambda: torch.autograd.grad(y, parts, dy, retain_graph=True), seconds, repeats)
    return {"forward": ahead, "backward": back}


def seconds_of(
    listed: Sequence[Product],
    dtype: torch.dtype,
    seconds: float,
    repeats: int,
    attention: Mapping[str, Sequence[float]] | None = None,
) -> list[tuple[Product, list[float]]]:
    """Seconds of each product alone; equal sizes are measured once.

    Args:
        listed: the products.
        dtype: of their operands.
        seconds: at each, at least.
        repeats: of each, at least.
        attention: what `attention_seconds` found; its products share that, softmax included, by their FLOPs.
    """
    known: dict[Product, list[float]] = {}
    found = []
    for one in listed:
        key = replace(one, name="", direction="forward", count=1)
        if attention and one.name in ATTENTION:
            together = sum(o.flops for o in listed if o.name in ATTENTION and _way(o) == _way(one))
            found.append((one, [took * one.flops / together for took in attention[_way(one)]]))
            continue
        if key not in known:
            known[key] = timed(one, dtype, seconds, repeats)
        found.append((one, known[key]))
    return found


def _way(one: Product) -> str:
    return "forward" if one.direction == "forward" else "backward"


def _rates(work: Work, tensor: int, precision: str) -> Iterator[tuple[Product, float, list[float]]]:
    """Each product with its share of the step's FLOPs and its FLOP/s."""
    dtype = measure.DTYPES[precision]
    listed = _listed(work, dtype, tensor)
    total = sum(one.step_flops for one in listed)
    attention: dict[str, list[float]] = {}
    if work.model != "fugaku":
        total += other_flops(work.shape, work.micro_batch) // tensor
        attention = attention_seconds(work.shape, work.micro_batch, dtype, tensor, work.seconds, work.repeats)
    for one, took in seconds_of(listed, dtype, work.seconds, work.repeats, attention):
        yield one, one.step_flops / total, [one.flops / seconds for seconds in took]


def _listed(work: Work, dtype: torch.dtype, tensor: int) -> list[Product]:
    if work.model == "fugaku":
        return [one for one in products(FUGAKU, work.micro_batch, tensor=tensor) if one.name != "head"]
    return step_products(work.shape, dtype, work.micro_batch, tensor=tensor)


def _row(
    one: Product, share: float, rates: Sequence[float], precision: str, threads: int, tensor: int, peak: Peak
) -> Row:
    split = f" tensor {tensor}" if tensor > 1 else ""
    element = measure.DTYPES[precision].itemsize
    rate = median(rates)
    return Row.of(
        f"{one.name} {one.direction} {one.label} {precision} {many(threads, 'thread')}{split}",
        "FLOP/s",
        rates,
        product=one.name,
        direction=one.direction,
        form=one.form,
        m=one.m,
        n=one.n,
        k=one.k,
        batch=one.batch,
        count=one.count,
        precision=precision,
        threads=threads,
        tensor=tensor,
        seconds=one.flops / rate,
        flops=one.flops,
        flops_per_second=rate,
        share=share,
        bytes=one.bytes(element),
        peak_share=rate / peak.measured,
        nominal_share=rate / peak.nominal if peak.nominal else None,
    )


def _notes(work: Work) -> list[str]:
    notes = ["operands are random; of best: of the best product in the same precision and threads; of peak: nominal"]
    if work.model == "fugaku":
        uneven = [split for split in work.tensor if FUGAKU.heads % split]
        if uneven:
            splits = ", ".join(map(str, uneven))
            notes.append(f"56 heads do not divide by {splits}: attention is that of a rank with most of them")
        return [*notes, "one layer without the output head; scores in full, T × T"]
    matrix = sum(one.step_flops for one in step_products(work.shape, torch.float32, work.micro_batch))
    other = other_flops(work.shape, work.micro_batch)
    notes.append(
        f"matrix products are {percent(matrix / (matrix + other))} of the step's FLOPs; of attention's scores the "
        "causal half is counted, in blocks as the trainer computes it"
    )
    return notes


def page(result: Result) -> list[object]:
    """What `tozan bench gemm` prints: a table for each precision, thread count and split."""
    parts: list[object] = [head(result)]
    setups = dict.fromkeys((row["precision"], row["threads"], row["tensor"]) for row in result.rows)
    for precision, threads, tensor in setups:
        rows = [
            row
            for row in result.rows
            if (row["precision"], row["threads"], row["tensor"]) == (precision, threads, tensor)
        ]
        split = f", the part of one rank of {tensor}" if tensor > 1 else ""
        parts += ["", f"{precision}, {many(threads, 'thread')}{split}", _products(rows)]
    return [*parts, "", foot(result)]


def _products(rows: Sequence[Row]) -> object:
    """One line for each product and direction, the blocks of attention together."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["product"], row["direction"]), []).append(row)
    lines = []
    for (name, direction), mine in groups.items():
        spent = sum(row["count"] * row["seconds"] for row in mine)
        rate = sum(row["count"] * row["flops"] for row in mine) / spent
        some = mine[-1]
        label = "×".join(str(some[size]) for size in ("batch", "m", "n", "k") if size != "batch" or some["batch"] > 1)
        label += f" +{len(mine) - 1}" if len(mine) > 1 else ""
        shares = (
            percent(rate * some[share] / some["flops_per_second"]) if some[share] else "—"
            for share in ("peak_share", "nominal_share")
        )
        cost = percent(sum(row["share"] for row in mine)), scaled(spent, "s"), scaled(rate, "FLOP/s")
        lines.append((name, direction, label, *cost, *shares))
    headings = ("product", "direction", "shape", "share", "a step", "rate", "of best", "of peak")
    return table(headings, lines, left=3)
