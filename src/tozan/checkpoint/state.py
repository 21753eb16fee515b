"""What a checkpoint holds, and the hash that says whether two states are the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
class State:
    """Everything a run needs to go on: what one checkpoint holds.

    Attributes:
        step: optimizer steps done.
        tensors: global tensors by name, `group/rest`: `model/embed.weight`, `optimizer/exp_avg/embed.weight`,
            `rng/cpu`. The group (lower-case letters, digits, `_`) names the files they are written to.
        meta: anything JSON can say exactly: data position, scheduler, scaler, ...
        files: small files carried along, by plain file name: `tokenizer.json`, `config.toml`.
    """

    step: int
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, JSON] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


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
    for name, tensor in state.tensors.items():
        if not _TENSOR_NAME.fullmatch(name) or name.endswith("/__metadata__"):
            raise ValueError(f"tensor name {name!r} must read group/rest, as in model/embed.weight")
        name.encode()
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


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's elements in row-major order as bytes, in pieces of at most `PIECE`; copies only if it must."""
    data = raw(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous())
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]


def combine(digests: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """The state hash from each tensor's (name, dtype, shape, SHA-256 of its bytes), in any order."""
    lines = sorted(json.dumps([name, dtype, list(shape), digest]) for name, dtype, shape, digest in digests)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def state_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of global tensors: equal exactly when the states are.

    It does not depend on the order of the mapping, on strides, or on the layout the state came from. The manifest
    of a checkpoint holds the same hash of its tensors, so that two can be compared without reading them.
    """
    return combine(
        (name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), _digest(tensor)) for name, tensor in tensors.items()
    )


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    for piece in pieces(tensor):
        digest.update(piece)
    return digest.hexdigest()
