"""Parameters that travel together: one flat buffer per unit, cut into equal shards.

Every parameter starts at a multiple of `SEGMENT` elements, and the end is padded so that each shard is a whole number
of segments: shards are equal (so the wire needs no padding of its own), and the gradient norm, which is summed by
segments, has the same bits wherever a parameter is cut. The padding is at most 255 elements per parameter and shard.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from tozan.layout import Packing, bucket_names


class Unit:
    """Some parameters laid out one after the other in a flat buffer of `total` elements.

    Args:
        name: for the ledger.
        parameters: of one dtype, by name.
        shards: equal parts that the buffer is cut into.
        copies: equal parts that each shard must divide into (hybrid sharding).

    Attributes:
        shapes: global shape of each parameter.
        offsets: where each parameter starts.
        total: elements of the buffer, padding included.

    Raises:
        ValueError: parameters of several dtypes.
    """

    def __init__(self, name: str, parameters: Mapping[str, nn.Parameter], shards: int, copies: int = 1) -> None:
        self.name, self.parameters, self.shards = name, dict(parameters), shards
        self.shapes = {key: p.shape for key, p in parameters.items()}
        self._packing = Packing({key: p.numel() for key, p in parameters.items()}, shards, copies)
        self.offsets, self.total = self._packing.offsets, self._packing.total
        dtypes = {p.dtype for p in parameters.values()}
        if len(dtypes) != 1:
            raise ValueError(f"unit {name} mixes {', '.join(sorted(map(str, dtypes)))}: one dtype per flat buffer")
        self.dtype = dtypes.pop()
        self.device = next(iter(parameters.values())).device

    @property
    def shard(self) -> int:
        """Elements of one shard."""
        return self._packing.shard

    def pack(self, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """A flat copy (total,) of one tensor per parameter; zeros in the padding and for None."""
        flat = torch.empty(self.total, dtype=self.dtype, device=self.device)
        end = 0
        for name, offset in self.offsets.items():
            flat[end:offset].zero_()
            tensor = tensors.get(name)
            end = offset + self.shapes[name].numel()
            if tensor is None:
                flat[offset:end].zero_()
            else:
                flat[offset:end].view(self.shapes[name]).copy_(tensor)
        flat[end:].zero_()
        return flat

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Every parameter's part of a flat buffer, in its shape."""
        return {
            name: flat[offset : offset + self.shapes[name].numel()].view(self.shapes[name])
            for name, offset in self.offsets.items()
        }

    def own(self, name: str, index: int) -> tuple[slice, slice]:
        """What shard `index` holds of a parameter: (where in the shard, where in the flattened parameter).

        Both are empty where the shard holds nothing of it.
        """
        return self._packing.own(name, index)


def buckets(
    parameters: Mapping[str, nn.Parameter], shards: int, limit_bytes: int, groups: Iterable[Collection[str]]
) -> list[Unit]:
    """Units of neighbouring parameters of one group and dtype, of at most `limit_bytes` unless one parameter is larger.

    Groups are collections of names; parameters in none are left out.
    """
    found: list[list[str]] = []
    for group in groups:
        for _, run in groupby((n for n in parameters if n in group), lambda name: parameters[name].dtype):
            sizes = {name: parameters[name].numel() * parameters[name].element_size() for name in run}
            found += bucket_names(sizes, limit_bytes)
    return [
        Unit(f"bucket {number}", {name: parameters[name] for name in bucket}, shards)
        for number, bucket in enumerate(found)
    ]


def by_block(
    model: nn.Module, blocks: Sequence[nn.Module], shards: int, copies: int = 1, apart: Collection[str] = ()
) -> tuple[list[Unit], list[Unit]]:
    """One unit per block, and the parameters outside of all blocks in one or two (before and after them).

    Those of `apart` make a unit each, named like the parameter.

    A parameter shared between modules belongs to the first that has it, and must not be shared by two blocks.

    Returns:
        (units of the blocks, units of the rest), in the order of the model.
    """
    inside = {id(p): number for number, block in enumerate(blocks) for p in block.parameters()}
    members: list[dict[str, nn.Parameter]] = [{} for _ in blocks]
    before: dict[str, nn.Parameter] = {}
    after: dict[str, nn.Parameter] = {}
    alone: dict[str, dict[str, nn.Parameter]] = {}
    seen_block = False
    for name, parameter in model.named_parameters():
        number = inside.get(id(parameter))
        seen_block = seen_block or number is not None
        group = members[number] if number is not None else after if seen_block else before
        (alone.setdefault(name, {}) if name in apart else group)[name] = parameter

    def units(groups: Iterable[tuple[str, dict[str, nn.Parameter]]]) -> list[Unit]:
        return [Unit(name, group, shards, copies) for name, group in groups if group]

    return (
        units((f"block {number}", group) for number, group in enumerate(members)),
        units((("before the blocks", before), ("after the blocks", after), *alone.items())),
    )
