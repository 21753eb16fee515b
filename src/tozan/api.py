"""What the command line does, as functions for notebooks and scripts: `import tozan; tozan.train_model("run.toml")`.

The names here are those of the package itself (`tozan.load_config`, ...), which imports this file only when one of
them is asked for. Each function imports what it needs when it runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tozan.config import Loaded
from tozan.config import load as load_config
from tozan.errors import Problem, UserError

if TYPE_CHECKING:
    from torch import nn

    from tozan.data import Manifest, Tokenizer
    from tozan.report.drawing import Figure
    from tozan.train import Result

Overrides = Mapping[str, Any] | Sequence[str]
"""`{"optim.lr": 1e-3}`, or flags as on the command line."""

__all__ = [
    "build_data",
    "convert",
    "evaluate",
    "figures",
    "generate",
    "load_config",
    "open_model",
    "train_model",
    "write_report",
]


def train_model(
    config: Loaded | Path | str,
    overrides: Overrides = (),
    on_record: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Train a model, or continue a run that was interrupted.

    Args:
        config: a TOML file, or what `load_config` returned.
        overrides: values that replace the file's; only together with a file.
        on_record: called with each metrics record as it is written.

    Returns:
        Where the run is and how it ended.

    Raises:
        UserError: config, data and run folder do not fit together; all mistakes at once, before torch is imported.
    """
    if isinstance(config, Loaded):
        if overrides:
            raise TypeError("overrides go to load_config, together with the file")
        config.require_ready()
        loaded = config
    else:
        loaded = load_config(config, overrides, to_run=True)
    from tozan.train import train

    return train(loaded, on_record)


def build_data(
    sources: Iterable[Path | str] | Path | str,
    out: Path | str,
    *,
    licence: str = "unknown",
    field: str = "text",
    encoding: str = "utf-8",
    errors: Literal["refuse", "replace"] = "refuse",
    on_event: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Manifest:
    """Turn text into a data set.

    Args:
        sources: files, folders or globs of text, `standard-library` (the running Python's documentation and source)
            or `debian` (Japanese and English documentation from Debian packages).
        out: the folder to write.
        licence: of texts that do not state their own.
        field: field of JSON lines or column of Parquet that holds the text.
        encoding: of text files.
        errors: bytes that are no text in `encoding` are mistakes (`refuse`), or become U+FFFD (`replace`).
        on_event: is told what is being done.
        options: `vocabulary`, `tokenizer`, `validation`, `shard_bytes`, `seed`, `limit`, `overwrite`: see
            `tozan.data.build`.

    Raises:
        UserError: a source is not there or holds no text, or an option makes no sense.
    """
    from tozan import data

    named = [sources] if isinstance(sources, str | Path) else list(sources)
    notes: Counter[str] = Counter()
    documents = data.corpus.gather(
        named, licence=licence, field=field, encoding=encoding, errors=errors, notes=notes, on_event=on_event
    )
    return data.build(documents, Path(out), notes=notes, on_event=on_event, **options)


def open_model(path: Path | str) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
    """The model and tokenizer of a run or a checkpoint, and its metadata.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    from tozan import train

    return train.open_model(Path(path))


def generate(
    path: Path | str,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Continue a prompt; yields text as it comes: `"".join(tozan.generate("runs/first", "def "))`.

    Args:
        path: a run folder or a checkpoint.
        prompt: the text to continue; empty: begin a document.
        tokens: tokens to add at most.
        temperature: 0 takes the likeliest token each time.
        top_k: choose among this many likeliest tokens.
        top_p: choose among the likeliest tokens that hold this probability together.
        seed: of the choices.

    Raises:
        UserError: there is no checkpoint, or an option makes no sense.
    """
    import torch

    from tozan.models.generate import generate as next_tokens

    model, tokenizer, _ = open_model(path)
    device = next(model.parameters()).device
    start = torch.tensor([tokenizer.encode(prompt) or [tokenizer.end]], device=device)
    pending: list[int] = []
    for token in next_tokens(model, start, tokens, temperature, top_k, top_p, seed, stop={tokenizer.end}):
        if int(token) == tokenizer.end:
            break
        pending.append(int(token))
        text = tokenizer.decode(pending)
        if not text.endswith("\ufffd"):  # else a character's bytes are not all there yet
            yield text
            pending = []
    if pending:
        yield tokenizer.decode(pending)


def evaluate(
    path: Path | str, data: Path | str | None = None, *, samples: int = 256, precision: str = "fp32"
) -> dict[str, float | int]:
    """Held-out loss and perplexity of a run or a checkpoint.

    Args:
        path: a run folder or a checkpoint.
        data: a data set; None: the one it was trained on.
        samples: held-out samples to score (fewer if there are fewer).
        precision: `fp32`, `bf16`, `fp16` or `fp64`.

    Raises:
        UserError: no checkpoint, no data, or data of another tokenizer.
    """
    from tozan import train

    return train.evaluate(Path(path), Path(data) if data is not None else None, samples, precision)


def convert(source: Path | str, destination: Path | str) -> Path:
    """A Hugging Face folder to a checkpoint, or a checkpoint (or run) to a Hugging Face folder.

    Which way is seen from `source`: a folder with a `config.json` is Hugging Face's.

    Args:
        source: where to read.
        destination: a folder that does not exist yet, or is empty.

    Returns:
        What was written: the Hugging Face folder, or the checkpoint inside `destination`.

    Raises:
        UserError: the source is neither, is damaged, or holds a model that tozan does not have.
    """
    source, destination = Path(source), Path(destination)
    if not source.is_dir():
        fix = "name a run, a checkpoint, or a Hugging Face folder with config.json and model.safetensors"
        raise UserError(Problem(str(source), "there is no such folder", fix))
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        fix = "name a folder that does not exist yet"
        raise UserError(Problem(str(destination), "is there already and not empty", fix))
    return (_import if (source / "config.json").is_file() else _export)(source, destination)


def _import(source: Path, destination: Path) -> Path:
    from tozan import checkpoint
    from tozan.checkpoint import huggingface

    shape, tensors = huggingface.load(source)
    tokenizer = huggingface.tokenizer_json(source)
    meta: dict[str, Any] = {"shape": dataclasses.asdict(shape), "imported_from": source.name}
    if tokenizer is not None:
        meta["tokenizer_sha256"] = hashlib.sha256(tokenizer).hexdigest()
    state = checkpoint.State(
        step=0,
        tensors={f"model/{name}": tensor for name, tensor in tensors.items()},
        meta=meta,
        files={} if tokenizer is None else {"tokenizer.json": tokenizer},
    )
    return checkpoint.save(destination, state)


def _export(source: Path, destination: Path) -> Path:
    from tozan import checkpoint
    from tozan.checkpoint import huggingface
    from tozan.models.arithmetic import Shape

    state = checkpoint.load(checkpoint.resolve(source), only="model/")
    tensors = {name.removeprefix("model/"): tensor for name, tensor in state.tensors.items()}
    shape: Any = state.meta["shape"]
    huggingface.save(Shape(**shape), tensors, destination, state.files.get("tokenizer.json"))
    return destination


def write_report(path: Path | str, out: Path | str | None = None, machine: str | None = None) -> Path:
    """Write the page of a run, a measurement or a plan; returns the HTML file.

    Args:
        path: a run folder, a result of `tozan bench` or a folder of them, or a plan's folder.
        out: where to write; None: `report.html` in the folder.
        machine: of a run: a machine or its file, to set a prediction beside the measurement.

    Raises:
        UserError: it is none of these.
    """
    from tozan import report

    return report.write(Path(path), Path(out) if out is not None else None, machine=machine)


def figures(path: Path | str, machine: str | None = None) -> dict[str, Figure]:
    """The figures of a run, a measurement or a plan, by name; in a notebook each shows itself.

    `tozan.figures("runs/first")["loss"]` as the last line of a cell draws the loss; `.standalone()` is its SVG, `.csv`
    its data.

    Args:
        path: as for `write_report`.
        machine: as for `write_report`.

    Raises:
        UserError: it is none of these.
    """
    from tozan import report

    return report.draw(Path(path), machine)
