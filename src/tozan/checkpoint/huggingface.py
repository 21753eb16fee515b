"""Folders in the format of Hugging Face's `transformers`, read and written without it.

GPT2LMHeadModel and LlamaForCausalLM: `config.json`, one `model.safetensors` or shards with an index, and
`tokenizer.json`. Everything that tozan's models do not compute alike is refused by name, and so is pickle.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tozan import files
from tozan.checkpoint.huggingface_config import read_json, read_shape, to_config, to_json
from tozan.errors import Problem, UserError
from tozan.models.arithmetic import Shape, block_matrices

SHARD_BYTES = 4 << 30
"""Largest file that `save` writes, in bytes (one tensor is never split)."""

_CONFIG, _INDEX, _WHOLE, _TOKENIZER = (
    "config.json",
    "model.safetensors.index.json",
    "model.safetensors",
    "tokenizer.json",
)
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ENDS = ("<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>")


@dataclass(frozen=True)
class _Entry:
    """One of our tensors and where `transformers` keeps it.

    Attributes:
        name: our name.
        size: our global size.
        parts: their names and the numbers of our rows in each, in order.
        transposed: they store inputs × outputs (GPT-2's `Conv1D`).
    """

    name: str
    size: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]
    transposed: bool = False

    def their_size(self, rows: int) -> tuple[int, ...]:
        """The size of a part that holds so many of our rows."""
        size = (rows, *self.size[1:])
        return size[::-1] if self.transposed else size


def load(folder: Path) -> tuple[Shape, dict[str, Tensor]]:
    """Reads a model folder of `transformers`.

    Args:
        folder: holds config.json and safetensors in fp32, bf16 or fp16. Its `tokenizer.json` is not touched: read it
            with `tokenizer_json`.

    Returns:
        The shape (a padded vocabulary stays padded; `dropout` is GPT-2's `resid_pdrop`, though `transformers` also
        drops attention weights) and the parameters by our names, in fp32.

    Raises:
        UserError: names every unsupported option, and every missing, unknown, misshapen or unreadable tensor.
    """
    folder = Path(folder)
    shape = read_shape(folder / _CONFIG)
    with ExitStack() as stack:
        sources = _open(folder, stack)
        entries = list(_entries(shape))
        _check(folder, shape, entries, sources)
        return shape, {entry.name: _assemble(entry, sources) for entry in entries}


def tokenizer_json(folder: Path) -> bytes | None:
    """The folder's `tokenizer.json`, or None if it has none.

    Raises:
        UserError: it is there but cannot be read.
    """
    path = Path(folder) / _TOKENIZER
    with files.naming(path, "read"):
        return files.read(path) if path.exists() else None


def save(
    shape: Shape,
    tensors: Mapping[str, Tensor],
    folder: Path,
    tokenizer_json: bytes | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers` opens with `from_pretrained`; it appears whole or not at all.

    Args:
        shape: the model's sizes. LLaMA's config has no place for `dropout`: it is left out.
        tensors: parameters by our names; stored in the types they have.
        folder: must not exist yet, or be empty.
        tokenizer_json: the tokenizer, copied beside the model.
        shard_bytes: largest size of a file of weights, in bytes.

    Raises:
        UserError: tensors that do not fit the shape, a shape that `transformers` has no model for, a folder in use,
            or a file system that refuses.
    """
    folder = Path(folder)
    entries = list(_entries(shape))
    problems = _mismatches(shape, entries, tensors)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problems.append(Problem(str(folder), "is already there", "name a folder that does not exist yet"))
    if problems:
        raise UserError(*problems)
    staged = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        with files.naming(folder, "write"):
            staged.mkdir(parents=True)
            _write_weights(entries, tensors, staged, shard_bytes)
            for name, data in _small_files(shape, tensors, tokenizer_json).items():
                with files.create(staged / name) as writer:
                    writer.write(data)
            files.sync_folder(staged)
            staged.rename(folder)
            files.sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _entries(shape: Shape) -> Iterator[_Entry]:
    """Every parameter of the model, with its names on both sides."""
    gpt2 = shape.family == "gpt2"
    d = shape.width
    yield _plain(
        "embed.weight", (shape.vocabulary, d), "transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"
    )
    if gpt2:
        yield _plain("position.weight", (shape.sequence, d), "transformer.wpe.weight")
    for layer in range(shape.layers):
        yield from _gpt2_block(shape, layer) if gpt2 else _llama_block(shape, layer)
    for leaf in ("weight", "bias")[: 2 if gpt2 else 1]:
        yield _plain(f"norm.{leaf}", (d,), f"transformer.ln_f.{leaf}" if gpt2 else f"model.norm.{leaf}")
    if not shape.tied:
        yield _plain("head.weight", (shape.vocabulary, d), "lm_head.weight")


def _plain(name: str, size: tuple[int, ...], theirs: str, transposed: bool = False) -> _Entry:
    """A tensor that is one tensor on both sides."""
    return _Entry(name, size, ((theirs, size[0]),), transposed)


def _gpt2_block(shape: Shape, layer: int) -> Iterator[_Entry]:
    """One GPT-2 block: norms, and matrices that `transformers` keeps transposed."""
    ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
    names = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
    for norm, their_norm in (("norm1", "ln_1"), ("norm2", "ln_2")):
        for leaf in ("weight", "bias"):
            yield _plain(f"{ours}.{norm}.{leaf}", (shape.width,), f"{theirs}.{their_norm}.{leaf}")
    for name, size in block_matrices(shape).items():
        yield _plain(f"{ours}.{name}.weight", size, f"{theirs}.{names[name]}.weight", transposed=True)
        yield _plain(f"{ours}.{name}.bias", size[:1], f"{theirs}.{names[name]}.bias")


def _llama_block(shape: Shape, layer: int) -> Iterator[_Entry]:
    """One LLaMA block: norms, and matrices; `transformers` keeps queries, keys and values apart."""
    ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
    yield _plain(f"{ours}.norm1.weight", (shape.width,), f"{theirs}.input_layernorm.weight")
    yield _plain(f"{ours}.norm2.weight", (shape.width,), f"{theirs}.post_attention_layernorm.weight")
    qkv = (("q_proj", shape.width), ("k_proj", shape.kv_width), ("v_proj", shape.kv_width))
    for name, size in block_matrices(shape).items():
        if name == "attn.qkv":
            parts = tuple((f"{theirs}.self_attn.{part}.weight", rows) for part, rows in qkv)
            yield _Entry(f"{ours}.{name}.weight", size, parts)
        else:
            their_name = "self_attn.o_proj" if name == "attn.proj" else f"{name}_proj"
            yield _plain(f"{ours}.{name}.weight", size, f"{theirs}.{their_name}.weight")


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Opens the files of weights.

    Returns:
        For each tensor by its name in the files (with GPT-2's prefix put back where its own release left it out), the
        safetensors slice: its size and type are known, its bytes are read when asked for.

    Raises:
        UserError: there are none, only pickled ones, or some that are missing or damaged.
    """
    slices: dict[str, Any] = {}
    problems: list[Problem] = []
    for path, expected in _weight_files(folder).items():
        try:
            opened = stack.enter_context(safe_open(path, framework="pt"))
            names = list(opened.keys())
            slices |= {name: opened.get_slice(name) for name in names}
            absent = sorted(expected - set(names))
            if absent:
                what = f"lacks {', '.join(absent[:3])}{' …' * (len(absent) > 3)}, which {_INDEX} places in it"
                problems.append(Problem(str(path), what, "copy the file again from its source"))
        except (OSError, SafetensorError) as error:
            problems.append(Problem(str(path), f"cannot be read: {error}", "copy the file again from its source"))
    if problems:
        raise UserError(*problems)
    if "wte.weight" in slices:
        slices = {name if name == "lm_head.weight" else f"transformer.{name}": part for name, part in slices.items()}
    return slices


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """The files of weights, with the tensors that the index expects in each."""
    if (folder / _INDEX).exists():
        placed = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
            raise UserError(Problem(f"{folder / _INDEX}: weight_map", "is no table of file names", "copy it again"))
        outside = sorted({file for file in placed.values() if Path(file).name != file or file in ("", ".", "..")})
        if outside:
            raise UserError(*(Problem(f"{folder / _INDEX}", f"names a file elsewhere: {name!r}") for name in outside))
        return {folder / file: {n for n, f in placed.items() if f == file} for file in sorted(set(placed.values()))}
    if (folder / _WHOLE).exists():
        return {folder / _WHOLE: set()}
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin*"))
    if pickled:
        what = f"has weights only as {pickled[0]}, a pickle, which can run any program when opened"
        fix = "ask for safetensors, or load it with transformers where that is safe and save_pretrained it anew"
        raise UserError(Problem(str(folder), what, fix))
    raise UserError(Problem(str(folder), f"has neither {_WHOLE} nor {_INDEX}", "name the folder with the weights"))


def _check(folder: Path, shape: Shape, entries: list[_Entry], sources: dict[str, Any]) -> None:
    """Compares what the files hold with what the shape needs.

    Raises:
        UserError: names every tensor that is missing, unknown, misshapen or of a type other than fp32, bf16, fp16.
    """
    expected = {part: entry.their_size(rows) for entry in entries for part, rows in entry.parts}
    problems = []
    for name, size in expected.items():
        where = f"{folder}: {name}"
        if name not in sources:
            problems.append(Problem(where, f"is missing; {_CONFIG} needs it, {_by(size)}", "copy the folder again"))
        elif tuple(sources[name].get_shape()) != size:
            what = f"is {_by(sources[name].get_shape())}; {_CONFIG} needs {_by(size)}"
            problems.append(Problem(where, what, "copy both files from one source"))
        elif sources[name].get_dtype() not in _TYPES:
            what = f"is {sources[name].get_dtype()}; tozan reads {', '.join(_TYPES)}"
            problems.append(Problem(where, what, "convert the weights to one of these types"))
    embedding = entries[0].parts[0][0]
    for name in sorted(set(sources) - set(expected)):
        if name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")):
            continue  # constants that older versions of transformers stored
        if name != "lm_head.weight" or not shape.tied:
            problems.append(Problem(f"{folder}: {name}", "is unknown to this architecture", "remove the tensor"))
        elif embedding in sources and not torch.equal(sources[name][:], sources[embedding][:]):
            what = f"differs from {embedding}, though tie_word_embeddings says they are one"
            problems.append(Problem(f"{folder}: {name}", what, f'write "tie_word_embeddings": false in {_CONFIG}'))
    if problems:
        raise UserError(*problems)


def _mismatches(shape: Shape, entries: list[_Entry], tensors: Mapping[str, Tensor]) -> list[Problem]:
    """What is wrong with tensors that are to be saved."""
    sizes = {entry.name: entry.size for entry in entries}
    found = [
        Problem(name, f"is missing; the model needs it, {_by(sizes[name])}") for name in sizes if name not in tensors
    ]
    found += [Problem(name, "is no parameter of this model") for name in tensors if name not in sizes]
    for name, tensor in tensors.items():
        if name in sizes and tuple(tensor.shape) != sizes[name]:
            found.append(Problem(name, f"is {_by(tensor.shape)}; the model needs {_by(sizes[name])}"))
        elif tensor.dtype not in _TYPES.values():
            found.append(Problem(name, f"is {tensor.dtype}; only {', '.join(_TYPES)} are saved"))
    if shape.family == "gpt2" and shape.kv_heads != shape.heads:
        what = f"{shape.kv_heads} key/value heads for {shape.heads} heads: GPT2LMHeadModel has no grouped queries"
        found.append(Problem("kv_heads", what, "only family llama can be converted with grouped queries"))
    return found


def _by(size: Any) -> str:
    """A size for people: 768 × 2304."""
    return " × ".join(map(str, size)) or "a single number"


def _assemble(entry: _Entry, sources: dict[str, Any]) -> Tensor:
    """Our tensor in fp32, from theirs."""
    parts = [sources[name][:].float() for name, _ in entry.parts]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.T.contiguous() if entry.transposed else whole


def _their_tensors(entry: _Entry, tensor: Tensor) -> dict[str, Tensor]:
    """Their tensors, each with storage of its own, from ours."""
    parts = tensor.detach().cpu().split([rows for _, rows in entry.parts])  # type: ignore[no-untyped-call]
    pairs = zip(entry.parts, parts, strict=True)
    return {name: (part.T if entry.transposed else part).clone().contiguous() for (name, _), part in pairs}


def _write_weights(entries: list[_Entry], tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Writes one file, or shards and their index, a shard at a time."""
    shards: list[list[_Entry]] = [[]]
    filled = total = 0
    for entry in entries:
        size = tensors[entry.name].nbytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled, total = filled + size, total + size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = _WHOLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        theirs = {name: part for entry in shard for name, part in _their_tensors(entry, tensors[entry.name]).items()}
        try:
            save_file(theirs, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # the library's word for a full disk, too
            raise UserError(Problem(str(folder / file), f"cannot write: {error}", "free space there")) from error
        _sync(folder / file)
        weight_map |= dict.fromkeys(theirs, file)
    if len(shards) > 1:
        with files.create(folder / _INDEX) as writer:
            writer.write(to_json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def _sync(path: Path) -> None:
    """Waits until a file's bytes are on the device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _small_files(shape: Shape, tensors: Mapping[str, Tensor], tokenizer: bytes | None) -> dict[str, bytes]:
    """config.json, and the tokenizer's files if there is one."""
    end = _end_token(tokenizer)
    config = to_config(shape) | {
        "bos_token_id": end[1] if end else None,
        "eos_token_id": end[1] if end else None,
        "torch_dtype": str(tensors["embed.weight"].dtype).removeprefix("torch."),
    }
    small = {_CONFIG: to_json(config)}
    if tokenizer is not None:
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.sequence}
        small |= {
            _TOKENIZER: tokenizer,
            "tokenizer_config.json": to_json(about | ({"eos_token": end[0]} if end else {})),
        }
    return small


def _end_token(tokenizer: bytes | None) -> tuple[str, int] | None:
    """Text and id of the token between documents, if the tokenizer has one of the usual names for it."""
    if tokenizer is None:
        return None
    with suppress(ValueError, KeyError, TypeError):
        added = {token["content"]: token["id"] for token in json.loads(tokenizer)["added_tokens"]}
        return next(((name, added[name]) for name in _ENDS if name in added), None)
    return None
