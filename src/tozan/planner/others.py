"""Published numbers that are no step times: memory, collectives, energy, shares of peak, days. One reader per table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tozan.models.arithmetic import parameters
from tozan.planner import collectives, costs, published, stacks
from tozan.planner.candidates import candidates
from tozan.planner.layer import Job
from tozan.planner.memory import memory
from tozan.planner.published import Case, Machines, gpt
from tozan.planner.table import Each, Row, rows

Triple = tuple[float, float, str]
"""Predicted, measured, use."""
Named = tuple[str, Triple]
"""Which line of the report, and what it compares."""

STATE, ACTIVATIONS = "memory: parameters and optimizer", "memory: activations"
WHOLE = "memory: whole device (BLOOM, nanotron)"
COLLECTIVE, CLUSTER = "vtrain_nccl_allreduce_lut (A100)", "ultrascale_playbook (bus bandwidth)"
ENERGY, PALM = "llama1_energy (MWh from GPU-hours)", "palm_mfu (Megatron-Turing)"
SCALARS = "megatron_sc21_scalars (days, checkpoint)"
LINES = (STATE, ACTIVATIONS, WHOLE, COLLECTIVE, CLUSTER, ENERGY, PALM, SCALARS)
ALONE = {STATE, ACTIVATIONS, ENERGY, PALM, SCALARS}
"""Lines whose rows are not of one kind, so that one constant for all of them means nothing."""

SHARED_CONGESTION = 0.75
"""Loss of bandwidth per doubling of nodes on the cluster of tables/ultrascale_playbook.csv, fitted to its rows; a
dedicated fabric, as in the machine files, loses 0.02."""


def compare(
    machines: Machines, tables: dict[str, list[Case]], folder: Path | None = None
) -> list[tuple[str, list[Triple]]]:
    """What is predicted and what was measured, line by line of the report.

    Args:
        machines: finds a machine by name.
        tables: cases of step times, of which some say their memory, too.
        folder: see `table.rows`.
    """
    found: dict[str, list[Triple]] = {name: [] for name in LINES}
    found[WHOLE] += _whole_memory(tables, folder)
    for table, reader in READERS.items():
        for row in rows(table, folder):
            for name, triple in reader(row, machines):
                found[name].append(triple)
    return [(name, triples) for name, triples in found.items() if triples]


def each(table: str, machines: Machines) -> Each:
    """What reads one row of a table."""
    return lambda row: READERS[table](row, machines)


def _memory(row: Row, machines: Machines) -> Iterator[Named]:
    """Korthikanti's figures 1 and 7. Their state is that of the blocks alone, without embeddings: so is ours here."""
    size = {size["model"]: size for size in rows("korthikanti_table5")}[row["model"]]
    width, layers, heads, batch = (int(size[key]) for key in ("hidden", "layers", "heads", "global_batch"))
    job = Job(gpt(width, layers, heads, 2048), machines("a100-80"), stacks.MEGATRON_2022, batch)
    modes = {"none": (0, "none"), "seq": (1, "none"), "selective": (0, "selective")}
    modes |= {"seq+selective": (1, "selective"), "full": (0, "full")}

    def price(mode: str) -> tuple[float, float]:
        parallel, recompute = modes[mode]
        tp, pp, chunks, micro = (int(size[key]) for key in ("tp", "pp", "virtual_pp", "micro_batch"))
        layout = candidates(
            tp=tp, pp=pp, chunks=chunks, micro_batch=micro, sequence_parallel=parallel, recompute=recompute
        )
        found = memory(job, layout).parts
        blocks, ends = costs.stage_parameters(job, layout)
        fixed = sum(float(found[key][0]) for key in ("parameters", "gradients", "optimizer"))
        return fixed * float(blocks[0] / (blocks[0] + ends[0])), float(found["activations"][0])

    fixed, activations = price(row["mode"])
    if row["figure"] == "fig1":
        yield STATE, (fixed / 2**30, float(row["params_optim_gib"]), row["use"])
        yield ACTIVATIONS, (activations / 2**30, float(row["activation_gib"]), row["use"])
    elif row["mode"] != "none":
        share = float(row["activation_pct_of_none"])
        yield ACTIVATIONS, (100 * activations / price("none")[1], share, row["use"])


def _whole_memory(tables: dict[str, list[Case]], folder: Path | None) -> Iterator[Triple]:
    """What runs reported per device: BLOOM's tuning and nanotron's best layouts; allocators and all."""
    for table, column in (("bigscience_bloom_tuning", "mem_gb"), ("nanotron_best_configs", "peak_mem_gb")):
        for row, case in zip(rows(table, folder), tables[table], strict=True):
            if row.get(column):
                held = float(np.broadcast_to(memory(case.job, case.layout).total, 1)[0]) / 1e9
                yield held, float(row[column]), row["use"]


def _collective(row: Row, machines: Machines) -> Iterator[Named]:
    """NCCL all-reduce of 2 to 8 GPUs in one node; the node files' three numbers are of these rows and of training."""
    if row["gpu"] != "a100":
        return  # that V100 node has a hybrid cube mesh, whose rate depends on which GPUs: no machine file of ours
    seconds = float(collectives.all_reduce(machines("a100-80"), int(row["bytes"]), int(row["n_gpus"]), 1))
    yield COLLECTIVE, (seconds * 1e6, float(row["time_us"]), row["use"])


def _cluster(row: Row, machines: Machines) -> Iterator[Named]:
    """Bus bandwidth on a shared cluster: means of a wide spread, 12.5 to 177 GB/s at 64 nodes."""
    shared = machines("h100-80").changed(network={"congestion": SHARED_CONGESTION})
    rate = float(collectives.bandwidth(shared, int(row["value_of_axis"]) * 8, 1)) / 1e9
    yield CLUSTER, (rate, float(row["value"]), row["use"])


def _energy(row: Row, _: Machines) -> Iterator[Named]:
    """LLaMA's energy: GPU-hours × 400 W × PUE 1.1, the convention of its table 15."""
    predicted = float(row["gpu_hours"]) * float(row["gpu_power_w"]) * float(row["pue"]) / 1e6
    yield ENERGY, (predicted, float(row["mwh"]), row["use"])


def _palm(row: Row, machines: Machines) -> Iterator[Named]:
    """PaLM's table of MFU: layouts are not said; only the row of MT-NLG on A100 can be priced without guesses."""
    if row["model"].startswith("Megatron"):
        case = next(case for case in published.cases("mtnlg_530b", machines) if "2240" in case.label)
        yield PALM, (100 * case.floor / case.predict(), float(row["mfu_pct"]), row["use"])


def _scalar(row: Row, machines: Machines) -> Iterator[Named]:
    """SC21's days to train and size of a checkpoint, where model and layout are said."""
    value, use = float(row["value"]), row["use"]
    if row["quantity"] == "days_to_train":
        large = row["config"].startswith("1T")
        shape = gpt(25600, 128, 160, 2048) if large else gpt(12288, 96, 96, 2048)
        layout = {"tp": 8, "pp": 64, "dp": 6} if large else {"tp": 8, "pp": 12, "dp": 10, "micro_batch": 1}
        job = Job(shape, machines("a100-80"), stacks.MEGATRON_2021, 3072 if large else 1540)
        tokens, devices = (450e9, 3072) if large else (300e9, 1024)
        priced = candidates(**layout, recompute="full")
        seconds = float(costs.step(job, priced).seconds[0]) * int(priced.ranks[0]) / devices
        yield SCALARS, (tokens / (job.global_batch * 2048) * seconds / 86400, value, use)
    elif row["quantity"] == "checkpoint_size":
        # Parameters in 16 bits and optimizer state in 32, 14 bytes each.
        yield SCALARS, (14 * parameters(gpt(25600, 128, 160, 2048)) / 1e12, value, use)


READERS: dict[str, Callable[[Row, Machines], Iterator[Named]]] = {
    "korthikanti_memory": _memory,
    "vtrain_nccl_allreduce_lut": _collective,
    "ultrascale_playbook": _cluster,
    "llama1_energy": _energy,
    "palm_mfu": _palm,
    "megatron_sc21_scalars": _scalar,
}
