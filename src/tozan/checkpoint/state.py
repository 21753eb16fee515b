"""What a checkpoint holds, whole or in boxes, and the hash that says whether two states are the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tozan import layout
from tozan.checkpoint import fingerprint
from tozan.files import PIECE

JSON = Any
"""Whatever JSON can say: null, booleans, numbers, strings, lists, and objects with string keys."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The safetensors format's names for element types, as its library 0.8 maps them to torch."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_TENSOR_NAME = re.compile(r"[a-z][a-z0-9_]*/.+", re.DOTALL)
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = ("manifest.json", "trainer.json")


@dataclass(frozen=True)
class Box:
    """A rectangular part of a global tensor.

    Attributes:
        offset: where it starts there, one number per dim.
        tensor: its values, of any strides.
    """

    offset: tuple[int, ...]
    tensor: Tensor

    def overlap(self, offset: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]] | None:
        """What this box and another one of the same global tensor have in common.

        Returns:
            A view of this box's values, and their place within the other box; None if they are apart.
        """
        mine, other = [], []
        for at, size, its_at, its_size in zip(self.offset, self.tensor.shape, offset, shape, strict=True):
            start, stop = max(at, its_at), min(at + size, its_at + its_size)
            if stop <= start:
                return None
            mine.append(slice(start - at, stop - at))
            other.append(slice(start - its_at, stop - its_at))
        return self.tensor.detach()[tuple(mine)], tuple(other)


@dataclass(frozen=True)
class Pieces:
    """Those boxes of a global tensor that one rank holds, or writes.

    Attributes:
        shape: of the global tensor.
        dtype: of its elements.
        boxes: apart from each other; none where the rank has nothing of it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Pieces:
        """All of a tensor, in one box."""
        return cls(tuple(tensor.shape), tensor.dtype, (Box((0,) * tensor.ndim, tensor),))


@dataclass(frozen=True)
class State:
    """Everything a run needs to go on: what one checkpoint holds.

    Attributes:
        step: optimizer steps done.
        tensors: global tensors by name, `group/rest`: `model/embed.weight`, `optimizer/exp_avg/embed.weight`,
            `rng/cpu`. The group (lower-case letters, digits, `_`) names the files they are written to.
        meta: anything JSON can say exactly: data position, scheduler, scaler, ...
        files: small files carried along, by plain file name: `tokenizer.json`, `config.toml`.
        pieces: global tensors that no rank need have whole, where several save together: this rank's boxes. Those of
            all ranks hold each element once.
    """

    step: int
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, JSON] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    pieces: Mapping[str, Pieces] = field(default_factory=dict)

    def held(self) -> dict[str, Pieces]:
        """All that this rank writes, whole tensors as one box."""
        return {**{name: Pieces.whole(tensor) for name, tensor in self.tensors.items()}, **self.pieces}


def check(state: State) -> bytes:
    """Refuse what a checkpoint could not give back exactly.

    Returns:
        `trainer.json`: the step and `meta`, encoded.

    Raises:
        ValueError: a name, number or file name that the format does not carry.
        TypeError: a tensor of a kind or dtype that the format does not carry, or meta that JSON does not know.
    """
    if type(state.step) is not int or state.step < 0:
        raise ValueError(f"step {state.step!r} must be a whole number of 0 or more")
    for name, pieces in state.held().items():
        if not _TENSOR_NAME.fullmatch(name) or name.endswith("/__metadata__"):
            raise ValueError(f"tensor name {name!r} must read group/rest, as in model/embed.weight")
        name.encode()
        for tensor in (box.tensor for box in pieces.boxes):
            if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
                kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
                raise TypeError(f"tensor {name!r} ({kind}): a checkpoint holds dense tensors of {', '.join(DTYPES)}")
    for name in state.files:
        if not _FILE_NAME.fullmatch(name) or name in _RESERVED or name.endswith(".safetensors"):
            raise ValueError(f"file name {name!r} must be plain, as in tokenizer.json, and none of {_RESERVED}")
    trainer = {"step": state.step, "meta": state.meta}
    try:
        encoded = json.dumps(trainer, allow_nan=False, indent=1, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise ValueError(f"meta: {error}: JSON has no NaN or infinity; write null or a string") from error
    if json.loads(encoded) != trainer:
        raise ValueError("meta changes on its way through JSON: use lists, not tuples, and strings as keys")
    return encoded.encode()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, over the same memory."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def blocks(box: Box) -> Iterator[Box]:
    """A box in contiguous blocks of at most `PIECE` bytes in the CPU's memory, in row-major order."""
    for offset, size in layout.slabs(box.tensor.shape, PIECE // box.tensor.element_size()):
        part = box.tensor.detach()[tuple(slice(at, at + length) for at, length in zip(offset, size, strict=True))]
        place = tuple(at + inside for at, inside in zip(box.offset, offset, strict=True))
        yield Box(place, part.cpu().resolve_conj().resolve_neg().contiguous())


def combine(sums: Iterable[tuple[str, str, Sequence[int], str]]) -> str:
    """The state hash from each tensor's (name, dtype, shape, fingerprint), in any order."""
    lines = sorted(json.dumps([name, dtype, list(shape), digits]) for name, dtype, shape, digits in sums)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def state_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and bytes of global tensors: differs if the states do (see `fingerprint`).

    It does not depend on the order of the mapping, on strides, or on the layout the state came from. The manifest
    of a checkpoint holds the same hash of its tensors, so that two can be compared without reading them.
    """
    return combine(
        (name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), fingerprint.text(_sum(tensor)))
        for name, tensor in tensors.items()
    )


def _sum(tensor: Tensor) -> fingerprint.Sum:
    total = fingerprint.zero()
    for block in blocks(Pieces.whole(tensor).boxes[0]):
        total += fingerprint.of(block.tensor, block.offset)
    return total
