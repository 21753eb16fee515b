"""What a run is: one table per concern, one docstring per field.

The docstrings are the reference: `tozan config schema`, the editor's hints and `docs/config.md` are made from them.
Rules that tie several fields together live in `check.py`. Upper bounds are far beyond any machine: they catch slips
of the keyboard, not ambition.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# Steps, batches and intervals: one bound for all, so that products of a few of them stay far inside 64 bits.
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
CountOrNone = Annotated[int, Field(ge=0, le=1_000_000_000)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
# One line of text: a control character in a path or a name is always a slip.
Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\u0000-\u001f\u007f]+$")]


class Table(BaseModel):
    """A TOML table: strict types, no unknown keys, no nan or inf, frozen once read."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Table):
    """The network. Give a preset, or every size; a size given beside a preset replaces the preset's."""

    preset: Text | None = None
    """Name of a shape that tozan ships, such as `gpt2-124m`; `tozan config show --presets` lists them."""
    family: Literal["gpt2", "llama"] = "gpt2"
    """`gpt2`: LayerNorm, learned positions, GELU, biases. `llama`: RMSNorm, RoPE, SwiGLU, no biases."""
    layers: Annotated[int, Field(ge=1, le=10_000)] = 12
    """Number of transformer blocks."""
    width: Annotated[int, Field(ge=1, le=1_048_576)] = 768
    """Width of the residual stream (hidden size); a multiple of `heads`."""
    heads: Annotated[int, Field(ge=1, le=65_536)] = 12
    """Number of query heads."""
    kv_heads: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Number of key/value heads (grouped-query attention); divides `heads`. Default: `heads`."""
    mlp_width: Annotated[int, Field(ge=1, le=8_388_608)] | None = None
    """Inner width of the MLP. Default: 4 × width for gpt2; 8/3 × width rounded up to a multiple of 64 for llama."""
    vocabulary: Annotated[int, Field(ge=2, le=16_777_216)] | None = None
    """Rows of the embedding. Default: the tokenizer's size rounded up to a multiple of 64."""
    sequence: Annotated[int, Field(ge=1, le=16_777_216)] = 1024
    """Tokens in a training sample, and for gpt2 the number of learned positions."""
    tied: bool = True
    """Share the embedding with the output head."""
    norm_eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-5
    """Added to the variance inside every norm."""
    rope_base: Annotated[float, Field(gt=1.0, le=1e12)] = 10_000.0
    """Base of the rotary frequencies (llama only)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on embeddings, attention output and MLP output; 0 for pre-training."""


class Data(Table):
    """Where samples come from, and in which order."""

    path: Annotated[Text, Field(examples=["data/mine"])]
    """Folder written by `tozan data build`."""
    seed: Seed = 0
    """Seed of the sample order. The order depends on this and on the step only."""
    verify: Literal["full", "members"] = "members"
    """`members`: check each member's checksum as it is read. `full`: check every shard's SHA-256 first, too."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """A damaged member stops the run (`refuse`), or is replaced by the next good sample and counted (`skip`)."""


Ranks = Annotated[int, Field(ge=1, le=1_000_000)]
"""A number of processes along one axis."""


class Layout(Table):
    """How a run is split over processes."""

    data: Ranks = 1
    """Data-parallel replicas; each takes its share of every global batch."""
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    """What replicas share instead of copying (ZeRO): 1 optimizer state, 2 also gradients, 3 also parameters."""
    zero_group: Annotated[Ranks, Field(examples=[4])] | None = None
    """Share inside groups of this many neighbours (data × context) and copy across groups. Default: all of them."""
    tensor: Ranks = 1
    """Processes that share every matrix (tensor parallelism)."""
    scheme: Literal["1d", "2d", "2.5d"] = "1d"
    """How they share it: `1d` Megatron, `2d` SUMMA (tensor = q × q), `2.5d` Tesseract (tensor = q × q × depth)."""
    depth: Ranks = 1
    """Depth of the 2.5d grid."""
    sequence_parallel: bool = False
    """Split norms and the residual stream over the tokens as well (1d only): less memory, the same bytes sent."""
    context: Ranks = 1
    """Processes that share every sequence (context parallelism): ring attention, each with 1/context of the tokens."""
    pipeline: Ranks = 1
    """Pipeline stages; each holds some of the layers."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = "1f1b"
    """Order of forward and backward passes in the pipeline."""
    chunks: Ranks = 1
    """Pieces of the model on each stage (interleaved only)."""
    split: Annotated[list[Ranks], Field(max_length=10_000, examples=[[4, 3, 3, 2]])] = []
    """Layers of each pipeline stage (of each piece, in the model's order, with chunks). Empty: as even as can be."""
    timeout: Annotated[int, Field(ge=5, le=86_400)] = 120
    """Seconds that a process may wait for others before the run is ended with a message that names who was late."""
    start_timeout: Annotated[int, Field(ge=5, le=86_400)] = 600
    """The same until all have come and taken their first step: some may import, read or compile minutes longer than
    others. Not less than `timeout`. After a loss an agent's processes, which continue from memory and have nothing to
    read or to compile, have `timeout` only; any other restart (from a checkpoint, in another layout, by torchrun or a
    batch system) reads files and may be on other machines, and has all of this again."""
    debug: bool = False
    """Compare number, operation, name, shape and type across processes before each collective, at the price of a
    message each: finds swapped operations, which otherwise give wrong numbers and no error."""

    @property
    def processes(self) -> int:
        """Processes of the whole run: data × context × tensor × pipeline."""
        return self.data * self.context * self.tensor * self.pipeline


class Train(Table):
    """The length of the run, the batch, and how a step is computed."""

    steps: Annotated[Count, Field(examples=[1000])]
    """Optimizer steps in the whole run."""
    micro_batch: Annotated[Count, Field(examples=[4])] | None = None
    """Samples in one forward pass of one process. Default: solved for, near 4,096 tokens."""
    accumulate: Annotated[Count, Field(examples=[8])] | None = None
    """Micro-batches of one process in one optimizer step. Default: solved for, else 1."""
    global_batch: Annotated[Count, Field(examples=[32])] | None = None
    """Samples in one optimizer step: micro_batch × accumulate × layout.data. Default: that product."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16"
    """Compute type. Weights, gradients and optimizer state stay fp32 (with fp64: fp64); fp16 scales the loss."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, the MLP's inner ones (`selective`), or all (`full`)."""
    recompute_stages: Annotated[
        list[Literal["none", "selective", "full"]], Field(max_length=10_000, examples=[["full", "none"]])
    ] = []
    """In place of `recompute`, one word for each pipeline stage: early stages hold the most micro-batches at once."""
    compile: bool | None = None
    """Compile each block with torch.compile (needs a C++ compiler; the first step takes up to a minute longer).
    Default: on a GPU, unless layout.zero is 3."""
    kernels: Literal["auto", "plain"] = "auto"
    """Operations compiled for this processor where there is a C++ compiler (`auto`), or those of PyTorch (`plain`)."""
    deterministic: bool = True
    """Give the same bits when repeated, in any number of replicas; these then send gradients every micro-batch."""
    seed: Seed = 0
    """Seed of the initial weights and of dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a GPU if there is one, and each process of a machine its own."""
    threads: Annotated[int, Field(ge=0, le=65_536)] = 0
    """Threads for computing; 0 means all cores this process may use."""
    max_bad_steps: CountOrNone = 10
    """Stop after this many skipped steps in a row (loss or gradient not finite)."""


class Optim(Table):
    """AdamW and its learning-rate schedule."""

    lr: Annotated[float, Field(gt=0.0, le=10.0)] = 6e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Learning rate at the last step."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warm-up; `wsd` (warm-up, stable, decay) holds the peak, then falls linearly over `decay` steps."""
    warmup: CountOrNone = 0
    """Steps of linear warm-up from 0 to `lr`; fewer than train.steps."""
    decay: Count | None = None
    """Length in steps of the final fall of `wsd`. Default: a fifth of the run."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the gradient's running mean."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay of the squared gradient's running mean."""
    eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.1
    """Decoupled weight decay, on matrices only (norms and biases are spared)."""
    clip: Annotated[float, Field(ge=0.0, le=1e9)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


class Eval(Table):
    """Held-out loss during the run."""

    every: CountOrNone = 0
    """Steps between evaluations; 0 means only at the end. Step 0 is always evaluated when this is above 0."""
    samples: Count = 64
    """Held-out samples per evaluation (fewer if the split is smaller), always the same ones."""


class Checkpoint(Table):
    """When state is saved and what is kept."""

    every: CountOrNone = 0
    """Steps between checkpoints; 0 means only at the end."""
    keep_last: Count = 2
    """Newest checkpoints to keep."""
    keep_every: CountOrNone = 0
    """Also keep each checkpoint whose step is a multiple of this; 0 keeps none. A multiple of `every`."""
    background: bool = True
    """Write while training goes on, from a copy of the state."""


class Recovery(Table):
    """What a run survives. All but `warning` and `deadline` take effect under `tozan agent` only."""

    copies: bool = True
    """Keep a copy of every process's state in memory, made after each step: a lost process costs one step at most."""
    neighbour: CountOrNone = 8
    """Steps between copies on another node, sent beside the training: what a lost node costs at most. 0: none."""
    wait: Annotated[float, Field(gt=0.0, le=86_400.0)] = 60.0
    """Seconds that agents wait for one another before the run begins with those that have come."""
    restarts: Count = 10
    """Restarts in a row without a new step, after which the agent gives up."""
    stopped: Annotated[float, Field(gt=0.0, le=86_400.0)] = 10.0
    """Seconds that a process may stand stopped (SIGSTOP) before it counts as lost."""
    machine: Annotated[Text, Field(examples=["machine.toml"])] | None = None
    """Machine, or file of `tozan bench calibrate`, for which the planner chooses a layout when ranks are lost; without
    one, the nearest is taken. Default: the run's own machine.toml."""
    warning: Literal["SIGUSR1", "SIGUSR2", "none"] = "SIGUSR1"
    """Signal by which the scheduler warns of the end, beside SIGTERM: the run saves and leaves with exit status 75."""
    deadline: Annotated[float, Field(ge=0.0, le=86_400.0, examples=[600.0])] | None = None
    """Seconds a step may stand still before the run ends with status 14; ten times as long for the start, the first
    step, evaluations and saves. 0: no end. Default: layout.timeout, or ten times what steps stood still so far."""


class Checks(Table):
    """Silent errors and slow processes: what is watched for while training."""

    memory: Literal["all", "rotating", "off"] | None = None
    """Checksums of weights and optimizer state, compared before each update: of `all`, or of a tenth in turn.
    Default: all; on a GPU, whose memory corrects single bits itself, rotating."""
    outlier: Annotated[float, Field(ge=0.0, le=1e6)] = 10.0
    """Compute a step again whose loss or gradient norm is this many robust deviations above those before; 0: never."""
    recompute: CountOrNone = 0
    """Compute every so many steps twice and compare the bits, to find errors of computing; 0: never."""
    on_error: Literal["rollback", "stop"] = "rollback"
    """After an error in memory: go back to the newest good checkpoint (`rollback`), or end the run (`stop`)."""
    slow: Annotated[float, Field(ge=0.0, le=100.0)] = 0.075
    """Report a process that takes this share longer per step than those with the same work; 0: never."""


class Metrics(Table):
    """What is written down. `metrics.jsonl` in the run folder is always written."""

    every: Count = 1
    """Steps between records."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs `pip install 'tozan[tensorboard]'`)."""
    wandb: Annotated[Text, Field(examples=["my-project"])] | None = None
    """Weights & Biases project to log to (needs `pip install 'tozan[wandb]'`; WANDB_MODE=offline works)."""
    profile: Annotated[list[CountOrNone], Field(max_length=2, examples=[[10, 12]])] = []
    """First and last step to trace, such as `[10, 12]`: writes `trace.json` for Perfetto. Empty: none."""


class Run(Table):
    """The run itself."""

    folder: Text = "runs/default"
    """Folder for the run's files; an unfinished run found there is continued."""


class Config(Table):
    """A run: `tozan train` executes it."""

    version: Annotated[Literal[1], Field(examples=[1])]
    """Version of this schema; always 1."""
    run: Run = Run()
    model: Model = Model()
    data: Data
    layout: Layout = Layout()
    train: Train
    optim: Optim = Optim()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    recovery: Recovery = Recovery()
    checks: Checks = Checks()
    metrics: Metrics = Metrics()
