"""A run, assembled from its config: data, model, optimizer, precision, and where it continues from."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import tozan
from tozan import checkpoint, files, models
from tozan.checkpoint import State
from tozan.config import Config, Loaded
from tozan.data import Dataset, Manifest
from tozan.errors import Problem, UserError
from tozan.models.arithmetic import Shape, model_flops, parameters, resolve
from tozan.optim.adamw import AdamW
from tozan.parallel import recompute
from tozan.train import machine
from tozan.train.precision import Precision

FLOPS_FORMULA = (
    "3 × forward per token; forward = 2 × weights of all products + 4 × layers × sequence × width (causal half counted)"
)


@dataclass
class Run:
    """Everything a step needs. `step`, `samples` and `tokens` count what is done, over all resumes."""

    config: Config
    folder: Path
    shape: Shape
    device: torch.device
    data: Dataset
    validation: Dataset | None
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: AdamW
    precision: Precision
    peak_flops: float
    config_toml: str
    step: int = 0
    samples: int = 0
    tokens: int = 0
    notes: list[tuple[str, str]] = field(default_factory=list)
    """Events of the assembly, as (event, text), to be written to the metrics."""

    @property
    def micro_batch(self) -> int:
        """Samples in one forward pass."""
        assert self.config.train.micro_batch is not None
        return self.config.train.micro_batch

    @property
    def global_batch(self) -> int:
        """Samples in one step."""
        assert self.config.train.global_batch is not None
        return self.config.train.global_batch

    @property
    def checkpoints(self) -> Path:
        """Folder of this run's checkpoints."""
        return self.folder / "checkpoints"

    def state(self) -> State:
        """All that is needed to continue as if nothing had happened; tensors are the live ones, not copies."""
        tensors = {f"model/{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"optimizer/{name}": t for name, t in self.optimizer.tensors().items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        meta = {
            "samples": self.samples,
            "tokens": self.tokens,
            "updates": self.optimizer.updates,
            "precision": self.precision.state(),
            "shape": dataclasses.asdict(self.shape),
            "data": {"path": str(Path(self.config.data.path).resolve()), "seed": self.config.data.seed},
            "tokenizer_sha256": self.data.tokenizer_sha256,
        }
        files = {"tokenizer.json": self.data.tokenizer_json, "config.toml": self.config_toml.encode()}
        return State(self.step, tensors, meta, files)

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint, read straight into the live tensors.

        Raises:
            UserError: the checkpoint belongs to another model or another tokenizer, or is damaged.
        """
        meta = checkpoint.load(folder, only="rng/").meta
        problems = [
            Problem(
                str(folder),
                f"has {name} {meta[name]!r}, this run has {mine!r}",
                "start a new run.folder, or use the config that the checkpoint was made with",
            )
            for name, mine in (
                ("shape", dataclasses.asdict(self.shape)),
                ("tokenizer_sha256", self.data.tokenizer_sha256),
            )
            if meta[name] != mine
        ]
        if problems:
            raise UserError(*problems)
        live = self.state()
        state = checkpoint.load(folder, into=live.tensors)
        torch.set_rng_state(state.tensors["rng/cpu"])
        self.optimizer.updates = meta["updates"]
        self.precision.load(meta["precision"])
        self.step, self.samples, self.tokens = state.step, meta["samples"], meta["tokens"]


def assemble(loaded: Loaded) -> Run:
    """Build the run that a config describes, and continue it from its newest good checkpoint if it has one.

    Raises:
        UserError: data, shape and checkpoint do not fit together, or a file is damaged.
    """
    config, folder = loaded.config, Path(loaded.config.run.folder)
    machine.prepare(config.train.threads, config.train.deterministic)
    device = machine.choose_device(config.train.device)
    data, validation = open_data(config)
    shape = resolve(config.model, data.vocabulary)
    if shape.vocabulary < data.vocabulary:
        raise UserError(
            Problem(
                loaded.origin.get("model.vocabulary", "model.vocabulary"),
                f"model.vocabulary {shape.vocabulary} is smaller than the tokenizer's {data.vocabulary} ids",
                "leave model.vocabulary out, or build the data with a smaller vocabulary",
            )
        )
    model = models.create(shape, config.train.seed).to(device)
    named = dict(model.named_parameters())
    recompute.apply(model, config.train.recompute)
    if config.train.compile:
        for block in model.blocks:
            block.compile()
    precision = Precision(config.train.precision, device)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(
        config=config,
        folder=folder,
        shape=shape,
        device=device,
        data=data,
        validation=validation,
        model=model,
        parameters=named,
        optimizer=AdamW(named, config.optim),
        precision=precision,
        peak_flops=machine.measure_gemm_rate(precision.dtype, device),
        config_toml=loaded.toml(),
    )
    torch.manual_seed(config.train.seed)
    resume(run)
    files.replace(folder / "config.toml", run.config_toml.encode())
    files.replace(folder / "run.json", json.dumps(facts(run), indent=2, ensure_ascii=False).encode())
    return run


def open_data(config: Config) -> tuple[Dataset, Dataset | None]:
    """The training split, and the held-out one if the data set has any."""

    def split(name: Literal["train", "validation"]) -> Dataset:
        return Dataset.open(
            Path(config.data.path),
            name,
            sequence=config.model.sequence,
            seed=config.data.seed,
            verify=config.data.verify,
            on_bad=config.data.on_bad,
        )

    held_out = Manifest.read(Path(config.data.path)).of("validation")
    return split("train"), split("validation") if held_out else None


def resume(run: Run) -> None:
    """Restore the newest good checkpoint of the run's folder; damaged ones are passed over and noted."""
    newest = checkpoint.newest(run.checkpoints, lambda problem: run.notes.append(("damaged checkpoint", str(problem))))
    if newest is not None:
        run.restore(newest)
        run.notes.append(("resumed", f"continues from {newest.name}"))


def facts(run: Run) -> dict[str, Any]:
    """What does not change during the run, for `run.json`: sizes, machine, versions, and the peak that MFU uses."""
    return {
        "parameters": parameters(run.shape),
        "shape": dataclasses.asdict(run.shape),
        "steps": run.config.train.steps,
        "global_batch": run.global_batch,
        "data": str(Path(run.config.data.path).resolve()),
        "machine": machine.describe(),
        "versions": {"tozan": tozan.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "device": str(run.device),
        "precision": run.config.train.precision,
        "peak_measured_flops": run.peak_flops,
        "peak_measured_how": "best square GEMM in this process at start, in the compute type, on random operands",
        "model_flops_per_token": model_flops(run.shape) / run.shape.sequence,
        "flops_formula": FLOPS_FORMULA,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


Listener = Callable[[dict[str, Any]], None]
"""Called with each metrics record as it is written."""
