"""ZeRO: data-parallel ranks share the work of holding the model (arXiv 1910.02054), in one engine of three stages.

Per rank, for P parameters over n ranks (`layout.zero_bytes` prices the same):

| stage | parameters | gradients | optimizer state | sent per step and rank, in units of P·(n-1)/n elements |
|---|---|---|---|---|
| 0 (`DataParallel`) | P | P | 2P | 2 |
| 1 | P | P | 2P/n | 2 |
| 2 | P | P/n | 2P/n | 1 + micro-batches |
| 3 | P/n | P/n | 2P/n | 2 × micro-batches, and 1 × micro-batches of gradients |

Stage 3 holds, beside its shards, the parameters outside of blocks and at most two blocks (the one that computes and the
next, gathered ahead). A stage 2 or 3 gradient is reduced in every micro-batch, since only a shard of it is kept. The
sums run in the order of micro-batches, as in `data` with `deterministic=True`, for stages 2 and 3 always.

Hybrid: `shards` is a part of the data-parallel axis (`mesh.part`); parameters are sharded inside it and copied across.
The gradient is then summed inside, and the shards across, once per step; with `deterministic=True` over all ranks at
once, in the order of micro-batches.

The optimizer steps `zero.parameters`: for every parameter this rank's flat slice, (elements,), under its global name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from tozan.comm import Axis, Handle
from tozan.comm import collectives as c
from tozan.layout import SEGMENT
from tozan.optim.gradients import segment_squares, sums_of_squares
from tozan.parallel.flat import Unit, by_block
from tozan.parallel.gathering import Gathering
from tozan.parallel.synchronizer import Relay, Synchronizer


class Zero:
    """Shards a model's training state over data-parallel ranks; used like `data.DataParallel`.

    Args:
        model: its parameters become views of flat buffers, under the same names; gradients must all be wanted.
        axis: all data-parallel ranks.
        stage: 1, 2 or 3.
        blocks: modules that are sharded, gathered and freed as one; default: `model.blocks`.
        shards: (inside, across) from `mesh.part(axis, size)` for hybrid sharding; default: the whole axis.
        deterministic: sum in the order of micro-batches, in stage 1 and hybrid sharding too.
        relays: see `data.DataParallel`.

    Attributes:
        parameters: this rank's slice of every parameter, empty where it holds nothing of it.
        matrices: names of the parameters that decay.
        resting: what must not change between `publish` and the optimizer's next step: whole, or slices in stage 3.
        whole_at_rest: whether `resting` is the same on all data-parallel ranks.
        whole_state: whether the optimizer's state is: never, here.
        starts: where in the flattened parameter each slice starts.
        replica: this rank's number among those that hold the same slices, and how many they are.

    Raises:
        ValueError: another stage, a frozen parameter, or a block without parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        axis: Axis,
        stage: int,
        *,
        blocks: Sequence[nn.Module] | None = None,
        shards: tuple[Axis, Axis] | None = None,
        deterministic: bool = True,
        relays: Mapping[str, Relay] | None = None,
    ) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"ZeRO stage {stage} is not 1, 2 or 3")
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        if frozen:
            raise ValueError(f"ZeRO updates every parameter, but these are frozen: {', '.join(frozen)}")
        inside, across = shards or (axis, Axis.single(f"{axis.name}_copies"))
        if blocks is None:
            blocks = list(model.blocks)  # type: ignore[arg-type]
        self.stage, self._axis = stage, inside
        inner, outer = by_block(model, blocks, inside.size, across.size, relays or ())
        if len(inner) != len(blocks):
            raise ValueError(f"ZeRO shards by blocks, but {len(blocks) - len(inner)} of them have no parameters")
        self._units = [*outer[:1], *inner, *outer[1:]]
        self.matrices = {name for unit in self._units for name, shape in unit.shapes.items() if len(shape) >= 2}
        self._flats, self._own = {}, {}
        for unit in self._units:
            flat, own = _flatten(unit, inside.index)
            self._flats[unit.name] = flat
            self._own[unit.name] = own.clone() if stage == 3 else own
        self.parameters = {
            name: nn.Parameter(self._own[unit.name][unit.own(name, inside.index)[0]])
            for unit in self._units
            for name in unit.shapes
        }
        # Below stage 3 every rank computes with the whole model, of which its slices are views.
        self.whole_at_rest, self.whole_state = stage < 3, False
        self.resting = dict(model.named_parameters()) if stage < 3 else self.parameters
        self.starts = {name: unit.own(name, inside.index)[1].start for unit in self._units for name in unit.shapes}
        self.replica = (across.index, across.size)
        self._gathering = Gathering(model, blocks, inner, outer, self._flats, self._own, inside) if stage == 3 else None
        self._settled: list[tuple[Unit, Handle]] = []
        self._gradients: dict[str, Tensor] = {}
        self._synchronizer = Synchronizer(
            self._units[::-1],
            axis,
            inside,
            across,
            deterministic or stage >= 2,
            deterministic,
            lambda unit, handle: self._settled.append((unit, handle)),
            self._gathering.backward_done if self._gathering else lambda _: None,
            relays,
        )

    def begin(self, last: bool) -> None:
        """Before each micro-batch: whether it is the last one of the step."""
        self._synchronizer.begin(last)

    def hand_over(self, names: Collection[str], last: bool) -> None:
        """In place of `begin`: see `Synchronizer.hand_over`."""
        self._synchronizer.hand_over(names, last)

    def finish(self) -> None:
        """After the last backward pass: wait until `.grad` of `parameters` is this rank's slice of the sum."""
        self._synchronizer.finish()
        if self._gathering:
            self._gathering.free_all()
        for unit, handle in self._settled:
            gradient = self._gradients[unit.name] = handle.wait()
            for name in unit.shapes:
                self.parameters[name].grad = gradient[unit.own(name, self._axis.index)[0]]
        self._settled.clear()

    def sums_of_squares(self) -> dict[str, float]:
        """Every whole gradient's sum of squares, after `finish`: on every rank the bits of a single process."""
        own = torch.cat([segment_squares(self._gradients[unit.name]) for unit in self._units])
        rows = c.all_gather(own.view(1, -1), self._axis, name="gradient norm")
        squares, start = {}, 0
        for unit in self._units:
            count = unit.shard // SEGMENT
            segments = rows[:, start : start + count].reshape(-1)
            start += count
            for name, offset in unit.offsets.items():
                first = offset // SEGMENT
                squares[name] = segments[first : first - (-unit.shapes[name].numel() // SEGMENT)]
        self._gradients.clear()
        return sums_of_squares(squares)

    def publish(self) -> None:
        """After the optimizer's step, or after `parameters` were loaded: the model computes with the new values."""
        if self._gathering:
            self._gathering.free_all()
            return
        handles = [
            c.gather_into_async(self._flats[u.name], self._axis, self._own[u.name], name=f"parameters of {u.name}")
            for u in self._units
        ]
        for handle in handles:
            handle.wait()

    def witness(self, on: bool) -> int | None:
        """`Synchronizer.witness`: a checksum of what this rank has sent since it was turned on."""
        return self._synchronizer.witness(on)

    def close(self) -> None:
        """Take the hooks off."""
        self._synchronizer.remove()
        if self._gathering:
            self._gathering.remove()


def _flatten(unit: Unit, index: int) -> tuple[Tensor, Tensor]:
    """Move a unit's parameters into one flat buffer (total,); returns it and this rank's shard of it."""
    flat = unit.pack({name: p.detach() for name, p in unit.parameters.items()})
    for name, view in unit.views(flat).items():
        unit.parameters[name].data = view
    return flat, flat[index * unit.shard : (index + 1) * unit.shard]
