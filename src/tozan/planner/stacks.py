"""What the software does with a layout: the same GPUs run Megatron of 2021 and of 2024 at different speeds.

A stack says which operations are fused, which communication is hidden and how wide gradients are. All are facts of
the programs; the overlaps are shares between what their authors describe and what calibration rows show, and
`slowdown`, `zero_rate` and `attention_rate` are fitted to calibration rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stack:
    """A trainer, as far as its speed and memory depend on it.

    Attributes:
        name: what it is called.
        flash: attention in one fused operation that keeps no scores; otherwise scores are written and read.
        attention_rate: speed of the fused attention beside the machine's (an early kernel is slower).
        fused: bias, GELU, dropout, residual, scale, mask and softmax are fused as Megatron does (SC21, section 4.2).
        dropout: dropout is on (its masks cost memory and traffic).
        parameter_bytes: bytes of the parameters that forward reads.
        gradient_bytes: bytes of the gradients kept.
        wire_bytes: bytes per gradient element in the data-parallel reduction.
        residual_bytes: bytes per element of the residual stream that is kept; `None`: those of the compute type.
        optimizer_bytes: bytes of optimizer state per parameter, master copy included.
        logits_bytes: traffic of the loss per logit, forward and backward.
        scatter_gather: pipeline messages are cut over the tensor-parallel ranks (SC21, section 4.1).
        dp_overlap: share of the backward pass behind which gradient reduction can hide.
        gather_overlap: share of the first forward pass behind which ZeRO's all-gather of parameters can hide.
        tp_overlap: share of the backward's tensor-parallel communication that is hidden behind weight gradients.
        pp_overlap: share of pipeline messages hidden.
        zero_rate: share of the network's collective bandwidth that ZeRO's all-gathers reach.
        slowdown: by how much all computation is slower for reasons that are not modelled; fitted to calibration rows.
        measured: runs of this stack are among the published tables; otherwise intervals are wider.
        loss_sync: every micro-batch ends in a tiny reduction over all replicas (Megatron averages the loss), so that
            everyone waits for the slowest each time and not once a step.
        selective: what `selective` recomputes: the attention core (Megatron), or norms and activations (tozan).
        by_cost: pipeline stages are cut so that the output head counts as the layers it costs as much as (nanotron's
            `get_block_compute_costs`); otherwise by number of layers.
    """

    name: str
    flash: bool = False
    attention_rate: float = 1.0
    fused: bool = True
    dropout: bool = True
    parameter_bytes: float = 2
    gradient_bytes: float = 4
    wire_bytes: float = 2
    residual_bytes: float | None = None
    optimizer_bytes: float = 12
    logits_bytes: float = 50
    scatter_gather: bool = True
    dp_overlap: float = 0.0
    gather_overlap: float = 0.0
    tp_overlap: float = 0.0
    pp_overlap: float = 0.0
    zero_rate: float = 1.0
    slowdown: float = 1.0
    measured: bool = True
    loss_sync: bool = True
    selective: Literal["attention", "mlp"] = "attention"
    by_cost: bool = False


MEGATRON_2020 = Stack("Megatron-LM 2020", scatter_gather=False)
MEGATRON_2021 = Stack("Megatron-LM 2021 (SC21)")
MEGATRON_DEEPSPEED = Stack("Megatron-DeepSpeed", scatter_gather=False, slowdown=1.15)
MEGATRON_2022 = Stack("Megatron-LM 2022 (Korthikanti)", tp_overlap=0.5)
MEGATRON_CORE = Stack(
    "Megatron-Core 2024",
    flash=True,
    dropout=False,
    wire_bytes=4,
    dp_overlap=0.9,
    gather_overlap=0.9,
    tp_overlap=0.8,
    pp_overlap=0.5,
)
LLM_FOUNDRY = Stack(
    "llm-foundry 2023 (FSDP)",
    flash=True,
    attention_rate=0.57,
    dropout=False,
    fused=False,
    logits_bytes=30,
    dp_overlap=0.9,
    loss_sync=False,
)
FSDP = Stack("PyTorch FSDP", flash=True, dropout=False, fused=False, logits_bytes=30, dp_overlap=0.9, loss_sync=False)
FSDP_COMPILED = Stack(
    "PyTorch FSDP, compiled", flash=True, dropout=False, logits_bytes=20, dp_overlap=0.9, loss_sync=False
)
ZERO_2021 = Stack("DeepSpeed ZeRO-3", dp_overlap=0.5, gradient_bytes=2, zero_rate=0.75, slowdown=1.25)
NANOTRON = Stack(
    "nanotron", flash=True, dropout=False, fused=False, logits_bytes=30, wire_bytes=4, dp_overlap=0.5, by_cost=True
)
MAXTEXT = Stack("MaxText", flash=True, dropout=False, dp_overlap=0.9, loss_sync=False)
FUGAKU_2022 = Stack(
    "Megatron-DeepSpeed on Fugaku, fp32",
    fused=False,
    dropout=True,
    parameter_bytes=4,
    gradient_bytes=4,
    wire_bytes=4,
    optimizer_bytes=8,
    scatter_gather=False,
)
TOZAN = Stack(
    "tozan",
    flash=True,
    fused=False,
    dropout=False,
    parameter_bytes=4,
    gradient_bytes=4,
    wire_bytes=4,
    optimizer_bytes=8,
    logits_bytes=12,
    residual_bytes=4,
    dp_overlap=0.5,
    measured=False,
    loss_sync=False,
    selective="mlp",
)

STACKS = {
    "tozan": TOZAN,
    "megatron-2021": MEGATRON_2021,
    "megatron-2022": MEGATRON_2022,
    "megatron-core": MEGATRON_CORE,
    "megatron-deepspeed": MEGATRON_DEEPSPEED,
    "fsdp": FSDP_COMPILED,
    "fugaku-2022": FUGAKU_2022,
}
"""Stacks that `tozan plan --stack` knows."""
