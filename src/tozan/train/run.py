"""A run, assembled from its config: data, model, optimizer, precision, and where it continues from."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import tozan
from tozan import checkpoint, files
from tozan.checkpoint import State
from tozan.comm import Mesh, processor
from tozan.config import Config, Loaded
from tozan.data import Dataset, Manifest
from tozan.errors import Problem, UserError
from tozan.models.arithmetic import Shape, model_flops, parameters, resolve
from tozan.ops import fused, native, products, tiles
from tozan.optim.adamw import SLOTS, AdamW
from tozan.train import machine
from tozan.train.checks import Checks
from tozan.train.copies import Copies
from tozan.train.crew import Crew
from tozan.train.precision import Precision
from tozan.train.split import Split, build, compiled, mesh_layout

FLOPS_FORMULA = (
    "3 × forward per token; forward = 2 × weights of all products + 4 × layers × sequence × width (masked half too)"
)


@dataclass
class Run:
    """Everything a step needs. `step`, `samples` and `tokens` count what is done, over all resumes and replicas.

    `returns`: the step that the run last went back to after an error in memory, and how often in a row.
    """

    config: Config
    folder: Path
    shape: Shape
    device: torch.device
    data: Dataset
    validation: Dataset | None
    split: Split
    optimizer: AdamW
    precision: Precision
    peak_flops: float
    config_toml: str
    checks: Checks
    step: int = 0
    samples: int = 0
    tokens: int = 0
    copies: Copies = field(default_factory=Copies)
    returns: tuple[int, int] = (-1, 0)
    ahead: dict[int, tuple[list[tuple[Tensor, Tensor]], int]] = field(default_factory=dict)
    """What `step.own_micro_batches` returns, read ahead, by the number of the step's first sample."""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """Events of the assembly, as (event, text), to be written to the metrics."""

    @property
    def micro_batch(self) -> int:
        """Samples in one forward pass."""
        assert self.config.train.micro_batch is not None
        return self.config.train.micro_batch

    @property
    def accumulate(self) -> int:
        """Micro-batches of this process in one step."""
        assert self.config.train.accumulate is not None
        return self.config.train.accumulate

    @property
    def global_batch(self) -> int:
        """Samples in one step, over all replicas."""
        assert self.config.train.global_batch is not None
        return self.config.train.global_batch

    @property
    def checkpoints(self) -> Path:
        """Folder of this run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files: metrics, checkpoints, facts."""
        return self.split.mesh.rank == 0

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors; the position in the data is counted in samples."""
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "updates": self.optimizer.updates,
            "precision": self.precision.state(),
            "shape": dataclasses.asdict(self.shape),
            "data": {"path": str(Path(self.config.data.path).resolve()), "seed": self.config.data.seed},
            "tokenizer_sha256": self.data.tokenizer_sha256,
        }

    def state(self) -> State:
        """All that is needed to continue as if nothing had happened, under global names and in global shapes.

        The tensors are the live ones, not copies: alone all of them, in a layout the boxes that this rank writes.
        """
        live = self._live()
        rng = {"rng/cpu": torch.get_rng_state()} if self.writes else {}
        files = {"tokenizer.json": self.data.tokenizer_json, "config.toml": self.config_toml.encode()}
        if self.split.alone:
            whole = {prefix + name: t for prefix, tensors in live.items() for name, t in tensors.items()}
            return State(self.step, whole | rng, self.meta(), files)
        mine = {
            prefix + name: pieces
            for prefix, tensors in live.items()
            for name, pieces in self.split.shared_out(tensors).items()
        }
        return State(self.step, rng, self.meta(), files, mine)

    def _live(self) -> dict[str, dict[str, Tensor]]:
        """This rank's tensors by parameter, under the prefix of their names in a checkpoint."""
        parameters, optimizer = self.split.sync.parameters, self.optimizer.tensors()
        return {
            "model/": {name: p.detach() for name, p in parameters.items()},
            **{f"optimizer/{slot}/": {name: optimizer[f"{slot}/{name}"] for name in parameters} for slot in SLOTS},
        }

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint, whatever layout it was saved under; each rank reads what it holds.

        Raises:
            UserError: the checkpoint belongs to another model or another tokenizer, or is damaged.
        """
        start = checkpoint.load(folder, only="rng/")
        refuse_other(folder, start.meta, self)
        checkpoint.fill(
            folder,
            {
                prefix + name: pieces
                for prefix, tensors in self._live().items()
                for name, pieces in self.split.held(tensors).items()
            },
        )
        self.split.sync.publish()
        torch.set_rng_state(start.tensors["rng/cpu"])
        self.take(start.step, start.meta)

    def take(self, step: int, meta: Mapping[str, Any]) -> None:
        """Continue counting from what `meta()` said after `step`."""
        self.optimizer.updates = meta["updates"]
        self.precision.load(meta["precision"])
        self.step, self.samples, self.tokens = step, meta["samples"], meta["tokens"]
        self.checks.forget()


def refuse_other(folder: Path, meta: Mapping[str, Any], run: Run) -> None:
    """Refuse a checkpoint of another model or tokenizer.

    Raises:
        UserError: names what differs, with both values.
    """
    problems = [
        Problem(
            str(folder),
            f"has {name} {meta[name]!r}, this run has {mine!r}",
            "start a new run.folder, or use the config that the checkpoint was made with",
        )
        for name, mine in (
            ("shape", dataclasses.asdict(run.shape)),
            ("tokenizer_sha256", run.data.tokenizer_sha256),
        )
        if meta[name] != mine
    ]
    if problems:
        raise UserError(*problems)


def shape_of(loaded: Loaded) -> Shape:
    """The shape of the run's model, its vocabulary from the data set's manifest.

    Raises:
        UserError: the data set's tokens do not fit into model.vocabulary.
    """
    vocabulary = Manifest.read(Path(loaded.config.data.path)).vocabulary
    shape = resolve(loaded.config.model, vocabulary)
    if shape.vocabulary < vocabulary:
        raise UserError(
            Problem(
                loaded.origin.get("model.vocabulary", "model.vocabulary"),
                f"model.vocabulary {shape.vocabulary} is smaller than the tokenizer's {vocabulary} ids",
                "leave model.vocabulary out, or build the data with a smaller vocabulary",
            )
        )
    return shape


def assemble(loaded: Loaded, mesh: Mesh | None = None) -> Run:
    """Build the run that a config describes, and continue it from its newest good checkpoint if it has one.

    Args:
        loaded: the config.
        mesh: the ranks; None for a run of one process.

    Raises:
        UserError: data, shape, layout and checkpoint do not fit together, or a file is damaged.
    """
    config, folder = loaded.config, Path(loaded.config.run.folder)
    mesh = mesh or Mesh.create(mesh_layout(config))
    device = machine.choose_device(config.train.device, mesh)
    # The launcher has set the threads of a rank among others.
    machine.prepare(
        config.train.threads if mesh.world_size == 1 else None,
        config.train.deterministic,
        config.train.kernels,
        compiled=compiled(config, device),
        device=device,
    )
    if (device.type, config.train.kernels, config.train.precision) == ("cpu", "auto", "bf16"):
        machine.agree_on_tiles(mesh)
    data, validation = open_data(config)
    shape = shape_of(loaded)
    precision = Precision(config.train.precision, device)
    split = build(config, shape, mesh, device, precision)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # private, whatever the umask
    copies = Copies.open()
    optimizer = AdamW(split.sync.parameters, config.optim, split.sync.matrices)
    run = Run(
        config=config,
        folder=folder,
        shape=shape,
        device=device,
        data=data,
        validation=validation,
        split=split,
        optimizer=optimizer,
        precision=precision,
        peak_flops=copies.peak_flops() or machine.measure_gemm_rate(precision.dtype, device) * mesh.world_size,
        config_toml=loaded.toml(),
        copies=copies,
        checks=Checks(config.checks, split, optimizer),
    )
    if config.train.kernels == "auto" and native.status() != native.COMPILED:
        run.notes.append(("kernels", native.status()))
    elif (device.type, config.train.precision) == ("cpu", "bf16"):
        run.notes += [("kernels", trouble) for task in tiles.TASKS if (trouble := tiles.trouble(task))]
    torch.manual_seed(config.train.seed)
    resume(run)
    if run.writes:
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
    """Go on from a copy in memory, else from the newest good checkpoint; damaged ones are passed over and noted."""
    if run.copies.resume(run):
        run.notes.append(("resumed", f"continues from the copy of step {run.step} in memory"))
        return
    newest = checkpoint.newest(
        run.checkpoints,
        lambda problem: run.notes.append(("damaged checkpoint", str(problem))),
        crew=Crew.of(run.split.mesh),
    )
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
        "kernels": native.status(),
        "compiled": compiled(run.config, run.device),
        "products": products.status(run.precision.dtype if run.device.type == "cpu" else None),
        "attention": fused.status(run.precision.dtype if run.device.type == "cpu" else None),
        "allocator": native.arena(),
        "processes": run.split.mesh.world_size,
        "layout": run.config.layout.model_dump(),
        "device": str(run.device),
        "precision": run.config.train.precision,
        "peak_measured_flops": run.peak_flops,
        "peak_measured_how": "best square GEMM at start, in the compute type, on random operands, × processes",
        **nominal_peak(run),
        "model_flops_per_token": model_flops(run.shape) / run.shape.sequence,
        "flops_formula": FLOPS_FORMULA,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def nominal_peak(run: Run) -> dict[str, Any]:
    """What all processes could do by their processors' make and clock, if each has the cores of this one."""
    precision, world = run.config.train.precision, run.split.mesh.world_size
    if run.device.type == "cuda":
        found = processor.nominal_gpu(precision, torch.cuda.get_device_name(run.device))
    else:
        found = processor.nominal(precision, torch.get_num_threads())
    flops = found.flops * world if found.flops else None
    how = f"{found.how} × {world} processes" if flops and world > 1 else found.how
    return {"peak_nominal_flops": flops, "peak_nominal_how": how}


Listener = Callable[[dict[str, Any]], None]
"""Called with each metrics record as it is written."""
