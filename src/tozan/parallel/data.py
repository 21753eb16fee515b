"""Data parallelism: every rank has the whole model and other samples; gradients are summed while the backward runs.

    sync = DataParallel(dict(model.named_parameters()), mesh["dp"])
    for j in range(accumulate):                      # this rank's micro-batches
        sync.begin(last=j == accumulate - 1)
        loss = model(*micro_batch(j * axis.size + axis.index)) / tokens_of_the_whole_step
        loss.backward()                              # hooks launch the buckets
    sync.finish()                                    # now .grad is the sum over all ranks
    norm = norm_of_sums(sync.sums_of_squares())
    optimizer.step(...)                              # over sync.parameters
    sync.publish()                                   # nothing to do here; ZeRO hands parameters round

`Zero` has the same methods. Losses are sums over tokens divided once by the tokens of the whole step, so gradients are
summed, never averaged.

Which micro-batch a rank runs matters for bits only: micro-batch number j·n + r belongs to rank r of n. With
`deterministic=True` the sum then runs in the order of micro-batches and equals the single process's, bit for bit; this
costs one reduce_scatter (G·(n-1)/n bytes, G the gradient's) per micro-batch. Without it only the last micro-batch
communicates. With one micro-batch per rank and step both are the same: 2·G·(n-1)/n bytes per rank and step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from tozan.comm import Axis, Handle
from tozan.comm import collectives as c
from tozan.optim.gradients import squares_of, sums_of_squares
from tozan.parallel.flat import Unit, buckets
from tozan.parallel.synchronizer import Relay, Synchronizer


class DataParallel:
    """Sums gradients over an axis, overlapped with the backward pass (see the module).

    Args:
        parameters: of the model, by name; their order is taken to be that of the forward pass.
        axis: the data-parallel ranks; with one rank nothing is hooked and nothing sent.
        deterministic: sum in the order of micro-batches.
        bucket_bytes: gradients sent together; small enough that the first leave early, large enough for the wire.
        groups: parameters whose gradients are handed over together (`hand_over`); default: all.
        relays: parameters, each a group of its own, whose sum ranks outside of the axis need or make: what each rank's
            part of it goes through on its way.
        broadcast: give every rank the parameters of the first; pointless where initial values are a function of names.

    Attributes:
        parameters: what an optimizer steps: those handed in.
        matrices: names of the parameters that decay.
        resting: what must not change between two steps of the optimizer: `parameters`.
        whole_at_rest: whether `resting` is the same on all ranks of the axis.
        whole_state: whether the optimizer's state is.
        starts: where in the flattened parameter each of `parameters` starts: at 0, they are whole.
        replica: this rank's number among those that hold the same parameters, and how many they are.
    """

    whole_at_rest = whole_state = True

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        axis: Axis,
        *,
        deterministic: bool = True,
        bucket_bytes: int = 32 << 20,
        groups: Sequence[Collection[str]] | None = None,
        relays: Mapping[str, Relay] | None = None,
        broadcast: bool = False,
    ) -> None:
        self.parameters = dict(parameters)
        self.resting = self.parameters
        self.matrices = {name for name, p in self.parameters.items() if p.ndim >= 2}
        self.starts, self.replica = dict.fromkeys(self.parameters, 0), (axis.index, axis.size)
        self._axis = axis
        self._gathers: list[tuple[Unit, Tensor, Handle]] = []
        self._synchronizer: Synchronizer | None = None
        if axis.size > 1:
            trainable = {name: p for name, p in reversed(self.parameters.items()) if p.requires_grad}
            units = buckets(trainable, axis.size, bucket_bytes, [self.parameters] if groups is None else groups)
            by_name = {unit.name: (relays or {}).get(next(iter(unit.parameters))) for unit in units}
            self._synchronizer = Synchronizer(
                units,
                axis,
                axis,
                Axis.single(f"{axis.name}_copies"),
                deterministic,
                True,
                self._settled,
                relays={name: relay for name, relay in by_name.items() if relay},
            )
        if broadcast:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    c.broadcast(parameter.data, axis, 0, name=f"parameter {name}")

    def begin(self, last: bool) -> None:
        """Before each micro-batch: whether it is the last one of the step."""
        if self._synchronizer:
            self._synchronizer.begin(last)

    def hand_over(self, names: Collection[str], last: bool) -> None:
        """In place of `begin`: see `Synchronizer.hand_over`."""
        if self._synchronizer:
            self._synchronizer.hand_over(names, last)

    def finish(self) -> None:
        """After the last backward pass: wait until every `.grad` is the sum over all ranks."""
        if not self._synchronizer:
            return
        self._synchronizer.finish()
        for unit, flat, handle in self._gathers:
            handle.wait()
            for name, gradient in unit.views(flat).items():
                unit.parameters[name].grad = gradient
        self._gathers.clear()

    def sums_of_squares(self) -> dict[str, float]:
        """Every gradient's sum of squares, after `finish`; the same on every rank."""
        return sums_of_squares(squares_of(self.parameters))

    def publish(self) -> None:
        """After the optimizer's step: every rank has stepped all parameters alike, so nothing is to be done."""

    def witness(self, on: bool) -> int | None:
        """`Synchronizer.witness`: a checksum of what this rank has sent since it was turned on; None if nothing is."""
        return self._synchronizer.witness(on) if self._synchronizer else None

    def close(self) -> None:
        """Take the hooks off."""
        if self._synchronizer:
            self._synchronizer.remove()

    def _settled(self, unit: Unit, shard: Handle) -> None:
        flat = torch.empty(unit.total, dtype=unit.dtype, device=unit.device)
        handle = c.gather_into_async(flat, self._axis, shard.wait(), name=f"gradients of {unit.name}")
        self._gathers.append((unit, flat, handle))


def in_order(values: Sequence[float], axis: Axis, *, name: str = "losses") -> list[float]:
    """One value per micro-batch of every rank, as all ranks' values in the order of micro-batches.

    Args:
        values: this rank's, one per micro-batch; the same number on every rank.
        axis: the data-parallel ranks.
        name: for the ledger.

    Returns:
        Value j of rank r at j·n + r: summed from the left they give the single process's bits.
    """
    own = torch.tensor([values], dtype=torch.float64)
    gathered: list[float] = c.all_gather(own, axis, name=name).t().flatten().tolist()
    return gathered
