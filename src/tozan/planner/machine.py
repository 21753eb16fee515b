"""Machines as files: what a processor, a node and a network can do, each number with its source.

A machine is one TOML page in `planner/machines/`, or any path. Units are SI: bytes, seconds, FLOP/s, bytes/s, watts.
"""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tozan.config.sources import bounded
from tozan.errors import Problem, UserError
from tozan.files import naming
from tozan.files import read as read_bytes

Precision = Literal["fp32", "bf16", "fp16"]
Above = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Natural = Annotated[int, Field(gt=0)]


class _Table(BaseModel):
    """A table of a machine file: no unknown keys, frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Gemm(_Table):
    """How fast matrix products of a given shape run."""

    efficiency: Share
    """Fraction of the peak that a very large product reaches."""
    units: Natural = 1
    """Multiprocessors or cores that each compute one tile at a time."""
    tiles: tuple[tuple[int, int, float], ...] = ((1, 1, 1.0),)
    """Tiles the library chooses from: rows, columns, speed relative to the largest. The last tiles of a product leave
    units idle (wave quantisation)."""
    k_half: Annotated[float, Field(ge=0.0)] = 0.0
    """Length of the summed dimension at which a product loses half its speed to its start and end."""
    align: Natural = 1
    """Matrix units want rows of memory whose length is a multiple of this many elements."""
    misaligned: Above = 1.0
    """By how much batched products (attention without fusion) are slower if they are not: no matrix units then."""
    odd: Above = 1.0
    """By how much a product is slower if its rows have an odd number of elements, which units cannot load in pairs."""
    attention: Share = 0.5
    """Fraction of the peak that fused (flash) attention reaches in a very long sequence."""
    attention_half: Annotated[float, Field(ge=0.0)] = 0.0
    """Length of a sequence at which it reaches half of that: tiles on the diagonal are computed whole, and start and
    end of a row of tiles count."""


class Device(_Table):
    """What one rank computes on: a GPU, or a CPU node."""

    kind: Literal["cpu", "gpu", "tpu"]
    """What it is."""
    memory: Above
    """Bytes of memory a rank may use."""
    reserve: Annotated[float, Field(ge=0.0)] = 0.0
    """Bytes of it that the system, the libraries and fragmentation take."""
    recompute_reserve: Annotated[float, Field(ge=0.0)] = 0.0
    """Bytes more where activations are recomputed: PyTorch's recomputation imports its compiler."""
    weight_copies: bool = True
    """Whether mixed precision copies the weights; tozan's own products take fp32 ones as they are."""
    bandwidth: Above
    """Nominal bytes/s of that memory."""
    bandwidth_efficiency: Share = 0.8
    """Fraction of it that element-wise work reaches."""
    stream_efficiency: Share | None = None
    """Fraction of it that the optimizer reaches, which runs through whole tensors; left out: `bandwidth_efficiency`."""
    peak: dict[Precision, Above]
    """Nominal FLOP/s by precision."""
    gemm: Gemm
    """Matrix products."""
    launch: Annotated[float, Field(ge=0.0)] = 0.0
    """Seconds that every operation costs the device beside its work."""
    host: Annotated[float, Field(ge=0.0)] = 0.0
    """Seconds the host needs to issue one operation; a layer takes no less than its operations times this."""


class Node(_Table):
    """Devices that share a box, and the links between them."""

    devices: Natural = 1
    """Ranks in one node."""
    bandwidth: Above = 1e11
    """Bus bandwidth (bytes/s) of a large all-reduce inside the node, in the convention of nccl-tests."""
    latency: Annotated[float, Field(ge=0.0)] = 0.0
    """Seconds to start a collective."""
    hop: Annotated[float, Field(ge=0.0)] = 0.0
    """Seconds per step of a ring, on top."""
    jitter: Annotated[float, Field(ge=0.0)] = 0.0
    """Seconds by which the latest of two hosts is late at a tensor-parallel collective; of n: log2 n times that."""
    wait: Annotated[float, Field(ge=0.0)] = 0.0
    """Seconds that ranks wait for each other at every tensor-parallel collective of a step, beside its own time."""


class Network(_Table):
    """Links between nodes."""

    kind: Literal["fat-tree", "torus"] = "fat-tree"
    """`torus`: groups that are not neighbours share links (see `rank_map`)."""
    bandwidth: Above
    """Bytes/s that one device gets into the network."""
    efficiency: Share = 0.8
    """Fraction of it that collectives reach."""
    latency: Annotated[float, Field(ge=0.0)] = 5e-6
    """Seconds of one message."""
    congestion: Annotated[float, Field(ge=0.0)] = 0.0
    """Loss of collective bandwidth for every doubling of the nodes: bandwidth / (1 + congestion × log2 nodes)."""
    shared: Above | None = None
    """Links that the rings of a group get if several, but not all, devices of a node belong to it, where devices share
    network cards; left out: one for each of them."""
    dims: tuple[int, ...] = ()
    """Sizes of the torus."""
    links: Natural = 1
    """Links that one node can drive at once."""
    rank_map: Literal["block", "linear"] = "block"
    """`block`: tensor-parallel groups get their own torus dims, so that no two rings share a link. `linear`: ranks are
    laid out as numbered, and a group of stride s shares each link with s − 1 others."""


class Host(_Table):
    """Where state goes when it does not fit: the host's memory and its NVMe."""

    memory: float = 0.0
    """Bytes per device."""
    bandwidth: Above = 1e10
    """Bytes/s between a device and its host memory, each way."""
    memory_bandwidth: Above = 5e10
    """Bytes/s per device at which the host's optimizer runs."""
    nvme: float = 0.0
    """Bytes per device."""
    nvme_bandwidth: Above = 1e9
    """Bytes/s per device."""


class Noise(_Table):
    """Delays that hit a rank now and then (the operating system, a slow node) and that everyone waits for."""

    rate: Annotated[float, Field(ge=0.0)] = 0.0
    """Delays per node and second of work."""
    delay: Annotated[float, Field(ge=0.0)] = 0.0
    """Mean length in seconds."""


class Economy(_Table):
    """What running it takes."""

    watts: float | None = None
    """Watts of one device with its share of the node."""
    overhead: Above = 1.1
    """Power usage effectiveness of the site."""
    price: float | None = None
    """Money for one device and hour, in `currency`; without it plans have no cost."""
    currency: str = "USD"
    """The money of `price`, and of every cost and budget of a plan on this machine."""
    node_mtbf_hours: Above = 50_000.0
    """Mean hours between failures of one node."""
    storage_bandwidth: Above = 1e9
    """Bytes/s that one node writes to shared storage."""
    storage_total: Above = 1e11
    """Bytes/s that all nodes together write."""
    restart_seconds: Above = 300.0
    """Seconds from a failure to the next step."""


class Trainer(_Table):
    """What tozan's own operations take on one rank, as `tozan bench calibrate` measured them (see `bench.units`).

    Coefficients are seconds, in order per: FLOP, weight, activation read or written, and call (`linear`, `grid`);
    element and call (`norm`, `rms`, `gelu`, `swiglu`, `rotary`); FLOP, score, element and sample (`attention`, `ring`);
    FLOP, logit, weight and call (`head`, `sharded_head`); activation, weight and call (`embedding`); parameter
    (`optimizer`).
    """

    precision: Precision
    """Compute type of the run."""
    threads: Natural
    """Threads of the rank, while the other cores are as busy."""
    linear_forward: tuple[float, float, float, float]
    """A linear layer, casts included."""
    linear_backward: tuple[float, float, float, float]
    """Its two gradients, added to `.grad`."""
    grid_forward: tuple[float, float, float, float] | None = None
    """A rank's products of a linear layer on a grid (2D and 2.5D)."""
    grid_backward: tuple[float, float, float, float] | None = None
    """Their two gradients."""
    norm_forward: tuple[float, float]
    """A residual sum and the norm after it."""
    norm_backward: tuple[float, float]
    """Its gradients."""
    rms_forward: tuple[float, float] | None = None
    """The same with LLaMA's norm."""
    rms_backward: tuple[float, float] | None = None
    """Its gradients."""
    rotary_forward: tuple[float, float] | None = None
    """Queries and keys, turned by their positions."""
    rotary_backward: tuple[float, float] | None = None
    """Their gradients."""
    gelu_forward: tuple[float, float]
    """GELU."""
    gelu_backward: tuple[float, float]
    """Its gradient."""
    swiglu_forward: tuple[float, float]
    """SiLU times its gate."""
    swiglu_backward: tuple[float, float]
    """Its gradients."""
    attention_forward: tuple[float, float, float, float]
    """Attention between its two products."""
    attention_backward: tuple[float, float, float, float]
    """Its gradients."""
    ring_forward: tuple[float, float, float, float] | None = None
    """A step of context parallelism's ring, put together with those before."""
    ring_backward: tuple[float, float, float, float] | None = None
    """Its gradients."""
    head: tuple[float, float, float, float]
    """Output head and loss, both ways."""
    sharded_head: tuple[float, float, float, float] | None = None
    """The same of a part of the vocabulary (tensor parallelism)."""
    embedding: tuple[float, float, float]
    """Embedding, both ways."""
    optimizer: tuple[float]
    """Norm, clipping and AdamW."""


class Measured(_Table):
    """A collective between ranks of one node, as measured at work: latency + bytes sent by a rank / rate."""

    operation: Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "send"]
    """Which, by its name in the ledger."""
    ranks: Natural
    """How many talked to each other."""
    world: Annotated[int, Field(ge=0)] = 0
    """Ranks of the node, all of them busy and talking in such groups; 0: `ranks`."""
    stride: Natural = 1
    """How far apart in rank numbers two neighbours of a group were."""
    item: Natural = 4
    """Bytes of an element; sums of 16-bit ones, and what is not cut along its first dim, cost copies."""
    latency: Annotated[float, Field(ge=0.0)]
    """Seconds of one with next to no bytes."""
    rate: Above
    """Bytes/s that a rank sends, all of them sending at once."""


class Crowd(_Table):
    """More ranks of one node than cores, as measured."""

    ranks: Natural
    """How many."""
    slowdown: Annotated[float, Field(ge=1.0)]
    """Of what each computes, beside taking turns: caches are another's, and turns cost something."""


class Machine(_Table):
    """A whole machine."""

    name: str
    """What the machine is called."""
    nodes: Natural
    """Nodes that a job may use."""
    device: Device
    node: Node = Node()
    network: Network
    host: Host = Host()
    noise: Noise = Noise()
    economy: Economy = Economy()
    cores: Annotated[int, Field(ge=0)] = 0
    """Cores of a node that ranks share; 0 where each rank has a device of its own."""
    trainer: tuple[Trainer, ...] = ()
    """Measured units of the trainer, one table per number of threads; without them a step is priced from the device."""
    collectives: tuple[Measured, ...] = ()
    """Measured collectives between the ranks of a node."""
    crowding: tuple[Crowd, ...] = ()
    """What more ranks than cores cost."""
    spread: Above = 0.08
    """Standard deviation of log(measured / predicted) for runs like those it was calibrated on."""
    sources: dict[str, str]
    """Where each number comes from: `device.peak = "…"`."""

    def changed(self, **tables: dict[str, Any]) -> Machine:
        """A copy with some keys of some tables replaced: `changed(network={"bandwidth": 12.5e9})`."""
        new = {name: getattr(self, name).model_copy(update=keys) for name, keys in tables.items()}
        return self.model_copy(update=new)

    @property
    def devices(self) -> int:
        """Devices of the whole machine."""
        return self.nodes * self.node.devices


def names() -> list[str]:
    """Machines that tozan ships."""
    return sorted(item.name.removesuffix(".toml") for item in _folder().iterdir() if item.name.endswith(".toml"))


_LARGEST = 1 << 20
"""Bytes of the largest machine file."""


def load(name: str) -> Machine:
    """Read a machine: one that tozan ships, by name, or a TOML file, by path.

    Raises:
        UserError: no such machine, or a file that breaks the rules; every mistake at once.
    """
    path = Path(name)
    if name in names():
        text, where = (_folder() / f"{name}.toml").read_text(encoding="utf-8"), f"{name}.toml"
    elif path.is_file():
        with naming(path, "read"):
            text, where = read_bytes(path, _LARGEST).decode(errors="replace"), str(path)
    else:
        fix = f"one of {', '.join(names())}, or the path of a machine file"
        what = f"no machine and no file is called {name!r}" if name else "a plan needs a machine"
        raise UserError(Problem("--machine", what, fix))
    try:
        return Machine.model_validate(tomllib.loads(bounded(text)))
    except ValidationError as error:
        mistakes = [
            Problem(f"{where}: {'.'.join(map(str, item['loc']))}", f"{item['input']!r:.80}: {item['msg']}")
            for item in error.errors()
        ]
        raise UserError(*mistakes) from None
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(where, f"not TOML: {error}")) from None


def _folder() -> Any:
    """The folder of the machine files, wherever the package lies."""
    return files("tozan.planner") / "machines"
