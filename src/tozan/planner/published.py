"""Published measurements as cases to predict: one reader per table in `planner/tables/`.

A reader turns a row into a job and a layout, says which stack and machine it was, and leaves what the source does not
say to a rule stated here. Every case is in seconds of a step, unless its table says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from tozan.models.arithmetic import Shape, hardware_flops, model_flops, parameters
from tozan.planner import costs, stacks
from tozan.planner.candidates import Candidates, candidates, join
from tozan.planner.layer import Job
from tozan.planner.machine import Machine, load
from tozan.planner.memory import memory
from tozan.planner.table import Each, Row, Rows, rows

Machines = Callable[[str], Machine]

VTRAIN_NETWORK = {"bandwidth": 12.5e9, "shared": 0.5}
"""Its cluster has 800 Gb/s per node of 8 (the table's own column `gpu`): two devices share a card. `shared` is fitted
to the errors of `vtrain_multi` (flat from 0.45 to 0.6): half a device's part, as if four groups left by one card."""
JEAN_ZAY_NETWORK = {"bandwidth": 6.25e9}
"""4 × Omni-Path 100 Gb/s per node of 8 (the table's own column `gpu`)."""


@dataclass(frozen=True)
class Case:
    """A published measurement that can be predicted.

    Attributes:
        table: file it comes from, without `.csv`.
        label: which row.
        use: `calibration` or `public`.
        job: model, machine, stack and batch.
        layout: one candidate; or several, of which the authors ran an unsaid one, taken to be the fastest.
        seconds: measured seconds of a step.
        group: cases of one group are layouts of the same job, which a planner should rank.
    """

    table: str
    label: str
    use: str
    job: Job
    layout: Candidates
    seconds: float
    group: str = ""

    def predict(self) -> float:
        """Predicted seconds of a step."""
        return self._predicted

    @cached_property
    def _predicted(self) -> float:
        return float(np.min(costs.step(self.job, self.layout).seconds))

    @property
    def floor(self) -> float:
        """Seconds if all devices ran the model's FLOPs at their peak: what the one-constant baseline scales."""
        devices = int(self.layout.ranks[0])
        total = model_flops(self.job.shape) * self.job.global_batch
        return total / (devices * self.job.machine.device.peak[self.job.precision])


def cases(table: str, machines: Machines = load, folder: Path | None = None) -> list[Case]:
    """Every case of a table.

    Args:
        table: one of `READERS`.
        machines: finds a machine by name; replaced while constants are fitted.
        folder: see `rows`.
    """
    return list(READERS[table](table, rows(table, folder), machines))


def each(table: str, machines: Machines) -> Each:
    """What reads one row of a table."""
    return lambda row: READERS[table](table, [row], machines)


def gpt(width: int, layers: int, heads: int, sequence: int, vocabulary: int = 51200) -> Shape:
    """A GPT as Megatron builds it: MLP four times as wide, tied embedding."""
    return Shape("gpt2", layers, width, heads, heads, 4 * width, vocabulary, sequence)


def llama(width: int, layers: int, heads: int, kv: int, mlp: int, vocabulary: int, sequence: int) -> Shape:
    """A LLaMA with an output head of its own."""
    return Shape("llama", layers, width, heads, kv, mlp, vocabulary, sequence, tied=False)


def megatron_seconds(shape: Shape, batch: int, devices: int, tflops: float, recompute: bool) -> float:
    """Seconds of a step from TFLOP/s per device, as Megatron counts: recomputed blocks, but not the head's."""
    work = hardware_flops(shape, "full") if recompute else model_flops(shape)
    return work * batch / (devices * tflops * 1e12)


def _sizes(row: Row, *names: str) -> list[int]:
    return [int(row[name]) for name in names]


def _sc21_table1(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """Megatron, SC21: full recomputation, interleaved where the scripts say so."""
    for row in found:
        width, layers, heads, sequence, vocabulary = _sizes(row, "hidden", "layers", "heads", "seq", "vocab")
        job = Job(gpt(width, layers, heads, sequence, vocabulary), machines("a100-80"), stacks.MEGATRON_2021, 0)
        job = replace(job, global_batch=int(row["global_batch"]))
        tp, pp, dp, micro, chunks = _sizes(row, "tp", "pp", "dp", "micro_batch", "virtual_pp")
        layout = candidates(tp=tp, pp=pp, dp=dp, micro_batch=micro, chunks=chunks, recompute="full")
        yield Case(table, row["model"], row["use"], job, layout, float(row["implied_iter_s"]))


def _sc21_table2(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """Megatron against DeepSpeed's ZeRO-3 (of 2021), both with full recomputation; not interleaved."""
    shapes = {"174.6": gpt(12288, 96, 96, 2048), "529.6": gpt(20480, 105, 128, 2048)}
    for row in found:
        shape = shapes[row["params_b"]]
        batch, devices, micro, tp, pp = _sizes(row, "global_batch", "gpus", "micro_batch", "tp", "pp")
        three = row["scheme"] == "ZeRO-3"
        stack = stacks.ZERO_2021 if three else stacks.MEGATRON_2021
        job = Job(shape, machines("a100-80"), stack, batch)
        dp = devices // (tp * pp)
        zero = 3 if three else 0
        layout = candidates(tp=tp, pp=pp, dp=dp, micro_batch=micro, zero=zero, recompute="full")
        seconds = megatron_seconds(shape, batch, devices, float(row["tflops_per_gpu"]), recompute=True)
        label = f"{row['scheme']} {row['params_b']}B, {devices} GPUs"
        yield Case(table, label, row["use"], job, layout, seconds)


def _mtnlg(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """Megatron-Turing 530B on Selene."""
    for row in found:
        width, layers, heads, sequence = _sizes(row, "hidden", "layers", "heads", "seq")
        tp, pp, dp, batch = _sizes(row, "tp", "pp", "dp", "global_batch")
        job = Job(gpt(width, layers, heads, sequence), machines("a100-80"), stacks.MEGATRON_DEEPSPEED, batch)
        layout = candidates(tp=tp, pp=pp, dp=dp, zero=1, recompute="full")
        yield Case(table, f"{row['gpus']} GPUs", row["use"], job, layout, float(row["iter_s"]))


def _korthikanti(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """Sequence parallelism and selective recomputation, each beside full recomputation."""
    for row in found:
        width, layers, heads, sequence, vocabulary = _sizes(row, "hidden", "layers", "heads", "seq", "vocab")
        tp, pp, chunks, batch, micro = _sizes(row, "tp", "pp", "virtual_pp", "global_batch", "micro_batch")
        shape = gpt(width, layers, heads, sequence, vocabulary)
        job = Job(shape, machines("a100-80"), stacks.MEGATRON_2022, batch)
        for column, parallel, recompute in (
            ("iter_s_full_recompute", 0, "full"),
            ("iter_s_seqpar_selective", 1, "selective"),
        ):
            layout = candidates(
                tp=tp, pp=pp, chunks=chunks, micro_batch=micro, sequence_parallel=parallel, recompute=recompute
            )
            label = f"{row['model']} {recompute}"
            yield Case(table, label, row["use"], job, layout, float(row[column]), group=row["model"])


def _megatron_2020(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """Tensor parallelism inside one DGX-2 or DGX A100; the whole batch is one micro-batch, recomputed."""
    for row in found:
        width, layers, heads, tp, batch = _sizes(row, "hidden", "layers", "heads", "tp", "global_batch")
        old = row["gpu"] == "DGX-2 V100"
        machine = machines("v100-32" if old else "a100-40")
        job = Job(gpt(width, layers, heads, 1024), machine, stacks.MEGATRON_2020, batch, "fp16")
        layout = candidates(tp=tp, micro_batch=batch, recompute="full")
        yield Case(table, f"{row['case']} {row['gpu']}", row["use"], job, layout, float(row["iter_ms"]) / 1e3)


def _h100_weak(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """Megatron-Core: no recomputation, sequence parallelism, distributed optimizer.

    Micro-batch and chunks are not said: the fastest that fit in memory, with chunks that divide the layers.
    """
    for row in found:
        width, layers, heads, sequence, vocabulary = _sizes(row, "hidden", "layers", "heads", "seq", "vocab")
        tp, pp, dp, batch, devices = _sizes(row, "tp", "pp", "dp", "global_batch", "gpus")
        shape = gpt(width, layers, heads, sequence, vocabulary)
        job = Job(shape, machines("h100-80"), stacks.MEGATRON_CORE, batch)
        per = batch // dp
        chunks = [v for v in range(1, layers + 1) if layers % (pp * v) == 0] if pp > 1 else []
        pairs = [(m, v) for m in (1, 2, 4) for v in chunks or [1] if per % m == 0 and per // m % pp == 0]
        micro, woven = zip(*pairs, strict=True)
        layout = candidates(tp=tp, pp=pp, dp=dp, micro_batch=micro, chunks=woven, zero=1, sequence_parallel=int(tp > 1))
        fits = memory(job, layout).fits(job)
        layout = layout.pick(fits) if fits.any() else layout
        seconds = megatron_seconds(shape, batch, devices, float(row["tflops_per_gpu"]), recompute=False)
        yield Case(table, row["model"], row["use"], job, layout, seconds)


def _llama3(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """Llama 3 405B: 126 layers on 16 stages, ZeRO 2 kept over micro-batches; attention counted in full."""
    for row in found:
        width, layers, heads, kv, mlp = _sizes(row, "hidden", "layers", "heads", "kv_heads", "ffn")
        sequence, vocabulary, devices = _sizes(row, "seq", "vocab", "gpus")
        shape = llama(width, layers, heads, kv, mlp, vocabulary, sequence)
        tp, cp, pp, dp, per = _sizes(row, "tp", "cp", "pp", "dp", "batch_per_dp")
        job = Job(shape, machines("h100-80"), stacks.MEGATRON_CORE, dp * per)
        layout = candidates(tp=tp, cp=cp, pp=pp, dp=dp, chunks=[1, 2, 4, 8], zero=1, sequence_parallel=1)
        # Its attention is causal and counted so: half of what `model_flops` counts.
        causal = model_flops(shape) - 6 * shape.layers * sequence**2 * width
        seconds = causal * job.global_batch / (devices * float(row["tflops_per_gpu"]) * 1e12)
        yield Case(table, f"{devices} GPUs, seq {sequence}", row["use"], job, layout, seconds)


def _vtrain(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """Megatron (of Megatron-DeepSpeed), 1F1B; full recomputation on many nodes, of attention's core on one.

    The column `recompute` of the table of one node is a default of the source's simulator, which itself prices a
    pipeline's last stage without it. Its times say otherwise: from micro-batch 4 to 8 a block takes less than full
    recomputation would at the peak of both the matrix units and the memory. Without tensor parallelism the vocabulary
    of 50,257 tokens is not padded, as in the source's configuration.
    """
    recompute = "selective" if table == "vtrain_single" else "full"
    for row in found:
        width, layers, heads, sequence, batch = _sizes(row, "hidden", "layers", "heads", "seq", "global_batch")
        tp, pp, dp, micro, devices = _sizes(row, "tp", "pp", "dp", "micro_batch", "gpus")
        machine = machines("a100-80").changed(network=VTRAIN_NETWORK)
        shape = gpt(width, layers, heads, sequence, 50257 if tp == 1 else 51200)
        job = Job(shape, machine, stacks.MEGATRON_2021, batch)
        layout = candidates(tp=tp, pp=pp, dp=dp, micro_batch=micro, recompute=recompute)
        label = f"h{width} L{layers} tp{tp} pp{pp} dp{dp} b{micro} B{batch}"
        group = f"h{width} L{layers} B{batch} on {devices}"
        yield Case(table, label, row["use"], job, layout, float(row["iter_ms"]) / 1e3, group)


def _bloom(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """BigScience's tuning of 176B and others: Megatron-DeepSpeed on Jean Zay."""
    for row in found:
        width, layers, heads, sequence, vocabulary = _sizes(row, "hidden", "layers", "heads", "seq", "vocab")
        tp, pp, dp, micro, batch = _sizes(row, "tp", "pp", "dp", "micro_batch", "global_batch")
        machine = machines("a100-80").changed(network=JEAN_ZAY_NETWORK)
        padded = -(-vocabulary // (128 * tp)) * 128 * tp  # as Megatron does, so that matrix units are filled
        shape = gpt(width, layers, heads, sequence, padded)
        job = Job(shape, machine, stacks.MEGATRON_DEEPSPEED, batch)
        layout = candidates(tp=tp, pp=pp, dp=dp, micro_batch=micro, zero=int(row["zero"]), recompute="full")
        label = f"{row['line']} h{width} L{layers} a{heads} pp{pp} dp{dp} b{micro}"
        group = f"h{width} L{layers} a{heads}"
        yield Case(table, label, row["use"], job, layout, float(row["sec_per_iter"]), group)


MPT = {
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "760m": (1536, 24, 12),
    "1b": (2048, 24, 16),
    "3b": (2560, 32, 20),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
}
"""Width, layers and heads of MosaicML's models (the table's `params` column confirms them)."""


def _mosaic(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """llm-foundry: FSDP on one node of 8, flash attention; recomputed where HFU is 4/3 of MFU."""
    for row in found:
        width, layers, heads = MPT[row["model"]]
        sequence, devices, micro, batch = _sizes(row, "seq", "gpus", "micro_batch", "global_batch")
        name = {"h100_80gb": "h100-80", "a100_80gb": "a100-80", "a100_40gb": "a100-40"}[row["gpu"]]
        shape = gpt(width, layers, heads, sequence, 50368)
        again = float(row["hfu_pct"]) > 1.1 * float(row["mfu_pct"])
        job = Job(shape, machines(name), stacks.LLM_FOUNDRY, batch)
        layout = candidates(dp=devices, micro_batch=micro, zero=3, recompute="full" if again else "none")
        seconds = batch * sequence / float(row["tokens_per_s"])
        label = f"{row['model']} {sequence} {row['gpu']}"
        yield Case(table, label, row["use"], job, layout, seconds)


def _nanotron(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """Nanotron's best layouts on one and two nodes of 8 H100; MFU of 989 TFLOP/s."""
    for row in found:
        width, layers, heads, mlp, sequence, vocabulary = _sizes(
            row, "hidden", "layers", "heads", "ffn", "seq_inferred", "vocab_inferred"
        )
        tp, pp, dp, micro, batch, devices = _sizes(row, "tp", "pp", "dp", "micro_batch", "global_batch_seqs", "gpus")
        shape = replace(llama(width, layers, heads, heads, mlp, vocabulary, sequence), tied=True)
        job = Job(shape, machines("h100-80"), stacks.NANOTRON, batch)
        layout = candidates(
            tp=tp, pp=pp, dp=dp, micro_batch=micro, zero=int(row["zero"]), sequence_parallel=int(tp > 1)
        )
        seconds = model_flops(shape) * batch / (devices * 989e12 * float(row["mfu_pct"]) / 100)
        yield Case(table, f"{row['params_b']}B on {devices}", row["use"], job, layout, seconds)


def _torchtitan(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """Torchtitan's bf16 rows (float8 is not modelled).

    Its H100 has HBM2e and a limit of 500 W, by which its products are slower than those of the 700 W H100.
    """
    for row in found:
        if "loat8" in row["variant"]:
            continue
        shape = llama(4096, 32, 32, 8, 14336, 128256, int(row["seq"]))
        machine = machines("h100-80").changed(device={"bandwidth": 2.0e12, "memory": 96e9})
        slower = machine.device.gemm.model_copy(update={"efficiency": machine.device.gemm.efficiency * 500 / 700})
        machine = machine.changed(device={"gemm": slower})
        tp, dp, micro, batch, devices = _sizes(row, "tp", "fsdp", "local_batch", "global_batch", "gpus")
        stack = stacks.FSDP_COMPILED if "compile" in row["variant"] or row["table"] != "1" else stacks.FSDP
        overlapped = replace(stack, tp_overlap=0.7) if "async" in row["variant"] else stack
        job = Job(shape, machine, overlapped, batch)
        layout = candidates(
            dp=dp, tp=tp, micro_batch=micro, zero=3, sequence_parallel=int(tp > 1), recompute="selective"
        )
        seconds = batch * shape.sequence / (float(row["tps_per_gpu"]) * devices)
        yield Case(table, f"{row['table']} {row['variant']}", row["use"], job, layout, seconds)


def _fugaku(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """The team's runs: fp32, one rank per node, 2.0 GHz; model parallelism is 1D over 4 nodes."""
    for row in found:
        width, layers, heads, sequence, vocabulary = _sizes(row, "hidden", "layers", "heads", "seq", "vocab")
        tp, pp, dp, batch, nodes = _sizes(row, "tp", "pp", "dp", "global_batch", "nodes")
        shape = gpt(width, layers, heads, sequence, vocabulary)
        job = Job(shape, machines("fugaku-2.0"), stacks.FUGAKU_2022, batch, "fp32")
        layout = candidates(tp=tp, pp=pp, dp=dp, recompute=row["activation_recompute"].replace("no", "none"))
        yield Case(table, f"{row['model']} on {nodes}", row["use"], job, layout, float(row["s_per_step"]))


def _talk(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """The talk's table: TFLOP/s per CPU, in which the row of one CPU counts the recomputed forward pass."""
    for row in found:
        dp, tp = _sizes(row, "dp", "mp")
        shape = gpt(2048, 24, 32, 1024, 50304)
        job = Job(shape, machines("fugaku-2.0"), stacks.FUGAKU_2022, 1024, "fp32")
        alone = dp * tp == 1
        layout = candidates(tp=tp, dp=dp, recompute="full" if alone else "none")
        # 24 f B s L h² (1 + s/6h + V/16Lh) with f = 4 or 3: for f = 3 that counts 3/4 of the head's products.
        work: float = hardware_flops(shape, "full" if alone else "none")
        work -= 0 if alone else 1.5 * shape.sequence * shape.vocabulary * shape.width
        work *= 1024
        seconds = work / (dp * tp * float(row["tflops_per_cpu"]) * 1e12)
        yield Case(table, f"{dp * tp} CPUs", row["use"], job, layout, seconds)


def _zero3_azure(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """DeepSpeed ZeRO-3 on Azure; TFLOP/s count the recomputed forward pass. Offload rows are of one V100."""
    shape = gpt(12288, 96, 96, 512)
    for row in found:
        tflops = float(row["value"])
        if row["kind"] == "zero3":
            job = Job(replace(shape, sequence=int(row["seq"])), machines("a100-80"), stacks.ZERO_2021, 0)
            micro, devices = _sizes(row, "micro_batch", "gpus")
            job = replace(job, global_batch=micro * devices)
            layout = candidates(dp=devices, micro_batch=micro, zero=3, recompute="full")
            work = hardware_flops(job.shape, "full") * micro
            label = f"{row['model']} b{micro} s{row['seq']}"
            yield Case(table, label, row["use"], job, layout, work / (tflops * 1e12), group=row["seq"])


def shape_of(billions: float, sequence: int, vocabulary: int = 32000) -> Shape:
    """A model of a given size where nothing more is said: about 128 wide per layer, heads of 128."""
    best: tuple[float, Shape] | None = None
    for layers in range(8, 145, 2):
        for ratio in (64, 96, 128, 160, 192, 224):
            width = -(-layers * ratio // 128) * 128
            shape = gpt(width, layers, max(1, width // 128), sequence, vocabulary)
            # Near in size, and as slender as large models are: about 128 wide per layer.
            gap = abs(parameters(shape) / (billions * 1e9) - 1) + 0.05 * abs(width / layers / 128 - 1)
            if best is None or gap < best[0]:
                best = (gap, shape)
    if best is None:
        raise ValueError("no shape")
    return best[1]


def _maxtext(table: str, found: Rows, machines: Machines) -> Iterator[Case]:
    """MaxText on TPU: model shapes and batches are not said; a shape of that size, ZeRO-3, the best micro-batch."""
    for row in found:
        shape = shape_of(float(row["model"].removesuffix("B")), 2048)
        machine = machines(f"tpu-{row['tpu']}")
        chips = int(row["chips"])
        layouts = join([candidates(dp=chips, micro_batch=b, zero=3, recompute="full") for b in (4,)])
        batch = 4 * chips
        job = Job(shape, machine, stacks.MAXTEXT, batch)
        seconds = model_flops(shape) * batch / (chips * float(row["tflops_per_chip"]) * 1e12)
        yield Case(table, f"{row['model']} {row['slice_type']}", row["use"], job, layouts, seconds)


READERS: dict[str, Callable[[str, Rows, Machines], Iterator[Case]]] = {
    "seed_fugaku_1p3B": _talk,
    "fugaku_runs": _fugaku,
    "megatron_sc21_table1": _sc21_table1,
    "megatron_sc21_table2": _sc21_table2,
    "korthikanti_table5": _korthikanti,
    "megatron_readme_h100_weak": _h100_weak,
    "vtrain_multi": _vtrain,
    "vtrain_single": _vtrain,
    "mtnlg_530b": _mtnlg,
    "bigscience_bloom_tuning": _bloom,
    "megatron_2020_tp_dp": _megatron_2020,
    "llama3_405b_table4": _llama3,
    "mosaicml_llmfoundry": _mosaic,
    "nanotron_best_configs": _nanotron,
    "torchtitan": _torchtitan,
    "deepspeed_zero_offload_infinity": _zero3_azure,
    "maxtext_tpu_torus": _maxtext,
}


def every(machines: Machines = load, folder: Path | None = None) -> dict[str, list[Case]]:
    """All cases of all tables."""
    return {table: cases(table, machines, folder) for table in READERS}
