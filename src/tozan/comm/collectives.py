"""Everything that is said between ranks goes through here, names its axis, and is written into the ledger.

What gloo does well is left to it (all_reduce of fp32 and fp64, all_gather, all_to_all, broadcast, messages between two
ranks). What it does badly is done otherwise:

* `reduce_scatter` is an all_to_all in chunks and a local sum (gloo's own sends twice as much).
* 16-bit sums travel as 16 bits but are added in fp32, and in the order of the ranks.
* With `ordered=True`, and in every reduce_scatter, sums run in the order of the ranks, wherever in the buffer an
  element stands; gloo's ring starts each piece at another rank.
* A maximum of NaN is NaN (gloo's MAX loses it).

Each `…_async` returns a `Handle`; start it, compute, then `wait()`. The other form waits at once. Over an axis of
size 1 everything is the identity. Axis indices (`source`, `to`) count along the axis, they are not global ranks.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tozan import wire
from tozan.comm.checks import compare
from tozan.comm.ledger import Entry
from tozan.comm.mesh import Axis
from tozan.layout import split

CHUNK_BYTES = 4 << 20
"""Largest piece of a chunked all_to_all: several in flight fill the wire where one large one leaves it idle."""
_ADVICE = re.compile(r"^\[/[^\]]*\] | This is typically.*")
"""What gloo puts around the reason of an error: a line of its own source, and where to look."""


class CommunicationError(RuntimeError):
    """An operation failed: a peer is gone, or the time is up."""


class Handle:
    """An operation under way.

    Args:
        axis: where it goes.
        entry: its line in the ledger; None if there is nothing to wait for.
        works: PyTorch's handles.
        finish: computes the result once all works are done; may communicate.
    """

    def __init__(self, axis: Axis, entry: Entry | None, works: Sequence[Any], finish: Callable[[], Tensor]) -> None:
        self._axis, self._entry, self._works, self._finish = axis, entry, list(works), finish
        self._result: Tensor | None = None
        if entry is not None and works and hasattr(works[-1], "get_future") and entry.operation not in ("send", "recv"):

            def stamp(_: Any, entry: Entry = entry) -> None:
                entry.transfer = time.perf_counter() - entry.start

            works[-1].get_future().then(stamp)

    def is_completed(self) -> bool:
        """Whether `wait` would return without standing still (but for a second phase that it may have)."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> Tensor:
        """The result; a second call returns it again.

        Raises:
            CommunicationError: a peer is gone or the timeout has passed. With a monitor on the axis the process ends
                instead, after the one message that names the culprit.
        """
        if self._result is not None:
            return self._result
        entry, begin = self._entry, time.perf_counter()
        try:
            for work in self._works:
                work.wait()
            stood = time.perf_counter()
            self._works.clear()
            self._result = self._finish()
        except RuntimeError as error:
            raise _explain(self._axis, entry, error) from None
        if entry is not None:
            entry.wait += stood - begin
            entry.transfer = entry.transfer or stood - entry.start
            self._axis.ledger.end(entry)
        return self._result


def _explain(axis: Axis, entry: Entry | None, error: RuntimeError) -> RuntimeError:
    if entry is None or isinstance(error, CommunicationError):
        return error
    if axis.monitor is not None:
        axis.monitor.failed(str(entry))
    reason = _ADVICE.sub("", str(error).strip().splitlines()[0])
    return CommunicationError(f"{entry} failed: {reason}")


def _begin(axis: Axis, operation: str, name: str, x: Tensor, sent: int) -> Entry:
    """Open a line in the ledger, and in debug mode first compare with the others."""
    entry = axis.ledger.begin(operation, name, axis.name, axis.ranks, sent, time.perf_counter())
    if axis.debug and operation not in ("send", "recv"):
        assert axis.group is not None
        compare(axis.group, axis.ranks, f"{entry.sequence}: {operation} '{name}' {tuple(x.shape)} {x.dtype}")
    return entry


def _start(axis: Axis, entry: Entry, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call torch.distributed; it can fail at the start already if a peer is gone."""
    try:
        return call(*arguments, group=axis.group, async_op=True, **options)
    except RuntimeError as error:
        raise _explain(axis, entry, error) from None


def _done(axis: Axis, x: Tensor) -> Handle:
    return Handle(axis, None, (), lambda: x)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are made in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def all_reduce(
    x: Tensor, axis: Axis, *, name: str = "", op: Literal["sum", "max"] = "sum", ordered: bool = False
) -> Tensor:
    """`all_reduce_async`, waited for."""
    return all_reduce_async(x, axis, name=name, op=op, ordered=ordered).wait()


def all_reduce_async(
    x: Tensor, axis: Axis, *, name: str = "", op: Literal["sum", "max"] = "sum", ordered: bool = False
) -> Handle:
    """Sum (or maximum) over the ranks, written into `x`, of any shape, contiguous.

    Args:
        x: the same shape and dtype on every rank.
        axis: ranks to sum over.
        name: for the ledger.
        op: `max` gives NaN where any rank has NaN.
        ordered: add in the order of the ranks, for bits that do not depend on where an element stands; always so for
            16-bit types, which are added in fp32 and rounded once.
    """
    if axis.size == 1:
        return _done(axis, x)
    if not x.is_contiguous():
        raise ValueError(f"all_reduce '{name}' writes in place and needs a contiguous tensor")
    if op == "max":
        gathered = all_gather_async(x.reshape(1, -1), axis, name=name)
        return Handle(axis, None, [gathered], lambda: x.copy_(gathered.wait().amax(0).view_as(x)))
    if not ordered and _wide(x.dtype) == x.dtype:
        entry = _begin(axis, "all_reduce", name, x, wire.all_reduce(_bytes(x), axis.size))
        return Handle(axis, entry, [_start(axis, entry, dist.all_reduce, x)], lambda: x)
    parts = [len(split(x.numel(), axis.size, i)) for i in range(axis.size)]
    scattered = scatter_sum_async(x.view(-1), axis, parts, name=name)

    def spread() -> Tensor:
        _gather_uneven(scattered.wait(), axis, parts, x.view(-1), name).wait()
        return x

    return Handle(axis, None, [scattered], spread)


def scatter_sum_async(
    flat: Tensor, axis: Axis, parts: Sequence[int], *, name: str = "", into: Tensor | None = None, first: bool = True
) -> Handle:
    """Rank i receives the sum over ranks of part i of a flat buffer, added in the order of the ranks.

    Args:
        flat: (sum of parts,), not to be changed before `wait`.
        axis: ranks to sum over.
        parts: elements of every rank's part.
        name: for the ledger.
        into: (parts[index],) where to leave the sum, in its dtype; default: a new tensor of `flat`'s.
        first: False adds to what `into` holds, one rank after the other: ((into + x₀) + x₁) + …
    """
    own = parts[axis.index]
    if into is None:
        into = flat.new_empty(own)
    if axis.size == 1:
        return _done(axis, into.copy_(flat) if first else into.add_(flat))
    entry = _begin(axis, "reduce_scatter", name, flat, wire.reduce_scatter(_bytes(flat), own * flat.element_size()))
    works, received = [], []
    chunks = max(1, -(-_bytes(flat) // CHUNK_BYTES))
    pieces = torch.split(flat, list(parts))
    for chunk in range(chunks):
        cuts = [split(part, chunks, chunk) for part in parts]
        send = flat
        if chunks > 1:
            send = torch.cat([piece[cut.start : cut.stop] for piece, cut in zip(pieces, cuts, strict=True)])
        mine = cuts[axis.index]
        got = flat.new_empty(axis.size * len(mine))
        sizes = [len(cut) for cut in cuts]
        works.append(_start(axis, entry, dist.all_to_all_single, got, send, [len(mine)] * axis.size, sizes))
        received.append((mine, got, send))  # `send` must live until the wire has taken it

    def add() -> Tensor:
        for mine, got, _ in received:
            _fold(got.view(axis.size, -1), into[mine.start : mine.stop], first)
        received.clear()
        return into

    return Handle(axis, entry, works, add)


def _fold(rows: Tensor, out: Tensor, first: bool) -> None:
    """Add the rows, (ranks, elements), one after the other to `out` (elements,)."""
    wide = out if out.dtype == _wide(rows.dtype) else out.to(_wide(rows.dtype))
    start = 0
    if first:
        wide.copy_(rows[0])
        start = 1
    for row in rows[start:]:
        wide.add_(row)
    if wide is not out:
        out.copy_(wide)


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0, *, name: str = "") -> Tensor:
    """The sum over ranks, of which this rank keeps its part (`layout.split`) along `dim`; a new tensor."""
    if axis.size == 1:
        return x
    moved = x.movedim(dim, 0).contiguous()
    inner = moved[0].numel()
    rows = [len(split(moved.shape[0], axis.size, i)) for i in range(axis.size)]
    flat = scatter_sum_async(moved.view(-1), axis, [count * inner for count in rows], name=name).wait()
    return flat.view(rows[axis.index], *moved.shape[1:]).movedim(0, dim).contiguous()


def all_gather(x: Tensor, axis: Axis, dim: int = 0, *, length: int | None = None, name: str = "") -> Tensor:
    """`all_gather_async`, waited for."""
    return all_gather_async(x, axis, dim, length=length, name=name).wait()


def all_gather_async(x: Tensor, axis: Axis, dim: int = 0, *, length: int | None = None, name: str = "") -> Handle:
    """The parts of all ranks joined along `dim`; a new tensor.

    Args:
        x: this rank's part.
        axis: ranks to collect from.
        dim: where the parts are joined.
        length: the joined size along `dim` if it does not divide evenly: parts are those of `layout.split`.
        name: for the ledger.
    """
    if axis.size == 1:
        return _done(axis, x)
    moved = x.movedim(dim, 0).contiguous()
    total = length if length is not None else moved.shape[0] * axis.size
    rows = [len(split(total, axis.size, i)) for i in range(axis.size)]
    if moved.shape[0] != rows[axis.index]:
        raise ValueError(f"all_gather '{name}': {moved.shape[0]} of {total} along dim {dim} is not rank {axis.index}'s")
    out = moved.new_empty(total, *moved.shape[1:])
    inner = out[0].numel()
    gathered = _gather_uneven(moved.view(-1), axis, [count * inner for count in rows], out.view(-1), name)
    return Handle(axis, None, [gathered], lambda: out.movedim(0, dim).contiguous())


def gather_into_async(flat: Tensor, axis: Axis, own: Tensor, *, name: str = "") -> Handle:
    """Fill a flat buffer (n·size,) from every rank's equal part `own` (n,), which may be a part of `flat` itself."""
    if axis.size == 1:
        if own.data_ptr() != flat.data_ptr():
            flat.copy_(own)
        return _done(axis, flat)
    return _gather_uneven(own, axis, [own.numel()] * axis.size, flat, name)


def _gather_uneven(own: Tensor, axis: Axis, parts: Sequence[int], out: Tensor, name: str) -> Handle:
    entry = _begin(axis, "all_gather", name, out, wire.all_gather(_bytes(out), axis.size))
    if min(parts) == max(parts):
        return Handle(axis, entry, [_start(axis, entry, dist.all_gather_single, out, own)], lambda: out)
    # gloo gathers equal parts only: pad to the longest, which is one row longer at most.
    longest = max(parts)
    padded = torch.cat((own, own.new_zeros(longest - own.numel())))
    joined = own.new_empty(axis.size * longest)

    def cut() -> Tensor:
        rows = joined.view(axis.size, longest)
        return torch.cat([row[:part] for row, part in zip(rows, parts, strict=True)], out=out)

    return Handle(axis, entry, [_start(axis, entry, dist.all_gather_single, joined, padded)], cut)


def broadcast(x: Tensor, axis: Axis, source: int, *, name: str = "") -> Tensor:
    """`broadcast_async`, waited for."""
    return broadcast_async(x, axis, source, name=name).wait()


def broadcast_async(x: Tensor, axis: Axis, source: int, *, name: str = "") -> Handle:
    """Overwrite `x` on every rank with that of the rank at index `source`."""
    if axis.size == 1:
        return _done(axis, x)
    sent = wire.broadcast(_bytes(x), axis.size, (axis.index - source) % axis.size)
    entry = _begin(axis, "broadcast", name, x, sent)
    return Handle(axis, entry, [_start(axis, entry, dist.broadcast, x, group_src=source)], lambda: x)


def reduce(x: Tensor, axis: Axis, target: int, *, name: str = "") -> Tensor:
    """The sum over ranks, added in their order, on the rank at index `target`; zeros elsewhere. A new tensor."""
    if axis.size == 1:
        return x
    flat = x.contiguous().view(-1)
    parts = [len(split(flat.numel(), axis.size, i)) for i in range(axis.size)]
    own = scatter_sum_async(flat, axis, parts, name=name).wait()
    here = axis.index == target
    entry = _begin(axis, "reduce", name, x, 0 if here else _bytes(own))
    out = torch.empty_like(flat) if here else flat.new_empty(0)
    takes = parts if here else [0] * axis.size
    gives = [own.numel() if i == target else 0 for i in range(axis.size)]
    work = _start(axis, entry, dist.all_to_all_single, out, own, takes, gives)
    Handle(axis, entry, [work], lambda: out).wait()
    return out.view_as(x) if here else torch.zeros_like(x)


def all_to_all(x: Tensor, axis: Axis, split_dim: int, join_dim: int, *, name: str = "") -> Tensor:
    """Cut `x` along `split_dim` into equal parts, one for each rank, and join what comes along `join_dim`.

    Raises:
        ValueError: the axis does not divide `split_dim`.
    """
    if axis.size == 1:
        return x
    if x.shape[split_dim] % axis.size:
        raise ValueError(f"all_to_all '{name}': {x.shape[split_dim]} along dim {split_dim} over {axis.size} ranks")
    send = torch.stack(x.chunk(axis.size, split_dim))
    entry = _begin(axis, "all_to_all", name, x, wire.all_gather(_bytes(x), axis.size))
    out = torch.empty_like(send)
    work = _start(axis, entry, dist.all_to_all_single, out, send)
    return Handle(axis, entry, [work], lambda: torch.cat(list(out), join_dim)).wait()


def send(x: Tensor, axis: Axis, to: int, *, tag: int = 0, name: str = "") -> None:
    """`send_async`, waited for."""
    send_async(x, axis, to, tag=tag, name=name).wait()


def send_async(x: Tensor, axis: Axis, to: int, *, tag: int = 0, name: str = "") -> Handle:
    """Send `x` to the rank at index `to`; it must not be changed before `wait`."""
    x = x.contiguous()
    entry = _begin(axis, "send", name, x, _bytes(x))
    try:
        work = dist.isend(x, group=axis.group, group_dst=to, tag=tag)
    except RuntimeError as error:
        raise _explain(axis, entry, error) from None
    return Handle(axis, entry, [work], lambda: x)


def recv(x: Tensor, axis: Axis, source: int, *, tag: int = 0, name: str = "") -> Tensor:
    """`recv_async`, waited for."""
    return recv_async(x, axis, source, tag=tag, name=name).wait()


def recv_async(x: Tensor, axis: Axis, source: int, *, tag: int = 0, name: str = "") -> Handle:
    """Receive from the rank at index `source` into `x`, which has the sender's shape and dtype and is contiguous."""
    entry = _begin(axis, "recv", name, x, 0)
    try:
        work = dist.irecv(x, group=axis.group, group_src=source, tag=tag)
    except RuntimeError as error:
        raise _explain(axis, entry, error) from None
    return Handle(axis, entry, [work], lambda: x)


def shift(x: Tensor, axis: Axis, by: int = 1, *, name: str = "") -> Tensor:
    """`shift_async`, waited for."""
    return shift_async(x, axis, by, name=name).wait()


def shift_async(x: Tensor, axis: Axis, by: int = 1, *, name: str = "") -> Handle:
    """Pass `x` on to the rank `by` further along the axis (a ring), get that of the rank `by` before; a new tensor."""
    if by % axis.size == 0:
        return _done(axis, x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    sent = send_async(x, axis, (axis.index + by) % axis.size, name=name)
    received = recv_async(out, axis, (axis.index - by) % axis.size, name=name)
    return Handle(axis, None, [sent, received], lambda: out)


def barrier(axis: Axis, *, name: str = "barrier") -> None:
    """Return when every rank of the axis has come here."""
    all_reduce(torch.zeros(1), axis, name=name)
