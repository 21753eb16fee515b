"""Seconds of single operations on one device: matrix products by shape, attention, element-wise work by bytes.

All sizes may be numpy arrays that broadcast against each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tozan.planner.candidates import Floats
from tozan.planner.machine import Device, Precision

Sizes = Any
"""An integer, a float or an array of them."""

ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an activation at each precision."""


def memory(device: Device, traffic: Sizes) -> Floats:
    """Seconds of an element-wise operation that moves `traffic` bytes."""
    return np.asarray(traffic, dtype=float) / (device.bandwidth * device.bandwidth_efficiency)


def gemm(device: Device, precision: Precision, m: Sizes, n: Sizes, k: Sizes, batch: Sizes = 1) -> Floats:
    """Seconds of `batch` products (m × k) · (k × n).

    The larger of two limits. Arithmetic: the product is cut into tiles, which run in waves over the device's units; the
    last wave is rarely full, and the best of the library's tiles is taken. A product with fewer tiles than units is
    cut along k as well. A short k leaves units waiting while tiles start and end. Traffic: each operand is
    moved once.
    """
    m, n, k, batch = (np.asarray(size, dtype=float) for size in (m, n, k, batch))
    spec = device.gemm
    unit_rate = device.peak[precision] * spec.efficiency / spec.units
    best: Floats = np.asarray(np.inf)
    for rows, columns, speed in spec.tiles:
        tiles = np.ceil(m / rows) * np.ceil(n / columns) * batch
        cuts = np.clip(np.minimum(spec.units // np.maximum(tiles, 1), k // 1024), 1, None)
        waves = np.ceil(tiles * cuts / spec.units)
        seconds = waves * (2.0 * rows * columns * (k / cuts + spec.k_half)) / (unit_rate * speed)
        best = np.minimum(best, seconds)
    if spec.align > 1:
        odd = (batch > 1) & ((n % spec.align != 0) | (k % spec.align != 0))
        best = best * np.where(odd, spec.misaligned, 1.0)
    moved = ITEM[precision] * batch * (m * k + k * n + m * n)
    return np.maximum(best, memory(device, moved)) + device.launch


def flash(device: Device, precision: Precision, flops: Sizes, length: Sizes) -> Floats:
    """Seconds of fused attention that does `flops` (the causal half only) over sequences of `length` tokens."""
    slower = 1 + device.gemm.attention_half / np.asarray(length, dtype=float)
    return np.asarray(flops, dtype=float) * slower / (device.peak[precision] * device.gemm.attention) + device.launch
