"""Texts between ranks."""

from __future__ import annotations

import torch

from tozan.comm import collectives
from tozan.comm.mesh import Axis


def all_gather_texts(text: str, axis: Axis, *, name: str = "texts") -> list[str]:
    """Every rank's text, in order of the ranks: a collective; eight bytes each if all are empty.

    Args:
        text: this rank's, of any length.
        axis: who exchanges.
        name: for the ledger.
    """
    data = text.encode()
    lengths = collectives.all_gather(torch.tensor([len(data)]), axis, name=name).tolist()
    longest = max(lengths)
    if longest == 0:
        return [""] * axis.size
    row = torch.zeros(1, longest, dtype=torch.uint8)
    row[0, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
    rows = collectives.all_gather(row, axis, name=name)
    return [bytes(r[:length].tolist()).decode() for r, length in zip(rows, lengths, strict=True)]
