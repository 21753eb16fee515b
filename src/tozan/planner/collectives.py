"""Seconds of collectives by algorithm and topology.

A group has `size` ranks, `stride` rank numbers apart. As many of them as fit sit in one node; the rest talk over the
network. Rings are priced for large messages, trees for small ones, the better is taken; inside nodes all devices' links
to the network carry a part of every ring (the hierarchical rings of NCCL).
"""

from __future__ import annotations

import numpy as np

from tozan.planner.candidates import Floats
from tozan.planner.kernels import Sizes
from tozan.planner.machine import Machine


def members(machine: Machine, size: Sizes, stride: Sizes) -> Floats:
    """Ranks of a group that share a node."""
    inside = np.maximum(1, machine.node.devices // np.maximum(1, np.asarray(stride)))
    return np.asarray(np.minimum(size, inside), dtype=float)


def bandwidth(machine: Machine, size: Sizes, stride: Sizes) -> Floats:
    """Bus bandwidth of a large collective, bytes/s, by the slowest link that its rings cross."""
    inside = members(machine, size, stride)
    nodes = np.asarray(size) / inside
    network = machine.network
    link = network.bandwidth * network.efficiency
    if network.kind == "torus":
        outside = link / congestion(machine, size, stride)
    else:
        links = inside
        if network.shared is not None:
            links = np.where((inside > 1) & (inside < machine.node.devices), network.shared, inside)
        outside = link * links / (1 + network.congestion * np.log2(np.maximum(nodes, 1)))
    return np.where(nodes > 1, np.minimum(outside, machine.node.bandwidth), machine.node.bandwidth)


def congestion(machine: Machine, size: Sizes, stride: Sizes) -> Floats:
    """Rings that share a link of a torus.

    With ranks laid out as numbered, a ring of stride s steps over s − 1 ranks, and the s rings that lie between use the
    same links; shorter ways over the other dims of the torus take up to as many as a node has links. A block map gives
    every axis its own dims.
    """
    stride = np.maximum(1, np.asarray(stride, dtype=float) / machine.node.devices)
    if machine.network.rank_map == "block":
        return np.ones(np.broadcast(stride, np.asarray(size)).shape)
    return np.asarray(np.maximum(1.0, stride / machine.network.links), dtype=float)


def start(machine: Machine, size: Sizes, stride: Sizes, steps: Sizes) -> Floats:
    """Seconds of a collective beside its bytes: one start, and `steps` messages one after the other."""
    inside = members(machine, size, stride)
    hop = np.where(np.asarray(size) > inside, machine.network.latency, machine.node.hop)
    return machine.node.latency + np.asarray(steps) * hop


def all_reduce(machine: Machine, moved: Sizes, size: Sizes, stride: Sizes) -> Floats:
    """Seconds to sum `moved` bytes over a group: the better of a ring and a double tree.

    Ring: 2 (n − 1) steps, 2 (n − 1) / n of the bytes over the slowest link. Tree: 2 log₂ n steps, twice the bytes.
    """
    size, moved = np.asarray(size, dtype=float), np.asarray(moved, dtype=float)
    rate = bandwidth(machine, size, stride)
    nodes = size / members(machine, size, stride)
    ring = start(machine, size, stride, 2 * (nodes - 1) + 2 * (size / nodes - 1)) + 2 * (size - 1) / size * moved / rate
    tree = start(machine, size, stride, 2 * np.log2(np.maximum(size, 2))) + 2 * moved / rate
    return np.where(size > 1, np.minimum(ring, tree), 0.0)


def all_gather(machine: Machine, moved: Sizes, size: Sizes, stride: Sizes) -> Floats:
    """Seconds until all ranks have all `moved` bytes, of which each had 1/n; a reduce-scatter takes as long."""
    size, moved = np.asarray(size, dtype=float), np.asarray(moved, dtype=float)
    nodes = size / members(machine, size, stride)
    steps = np.minimum((nodes - 1) + (size / nodes - 1), 4 * np.log2(np.maximum(size, 2)))
    seconds = start(machine, size, stride, steps) + (size - 1) / size * moved / bandwidth(machine, size, stride)
    return np.where(size > 1, seconds, 0.0)


def broadcast(machine: Machine, moved: Sizes, size: Sizes, stride: Sizes) -> Floats:
    """Seconds to bring `moved` bytes from one rank to the others of a group, pipelined in pieces."""
    size = np.asarray(size, dtype=float)
    seconds = start(machine, size, stride, np.log2(np.maximum(size, 2))) + moved / bandwidth(machine, size, stride)
    return np.where(size > 1, seconds, 0.0)


def send(machine: Machine, moved: Sizes, stride: Sizes) -> Floats:
    """Seconds of one message to the rank `stride` away."""
    inside = np.asarray(stride) < machine.node.devices
    link = machine.network.bandwidth * machine.network.efficiency
    return np.where(
        inside,
        machine.node.latency / 2 + np.asarray(moved) / machine.node.bandwidth,
        machine.node.latency / 2 + machine.network.latency + np.asarray(moved) / link,
    )
