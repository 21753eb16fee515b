"""Bytes that one rank sends for each collective, as integers: what the ledger books and what the planner forecasts.

The algorithms are those that `comm.collectives` runs: a ring for all_reduce and all_gather, direct exchange for
reduce_scatter and all_to_all, a binomial tree for broadcast.
"""

from __future__ import annotations


def all_reduce(total: int, ranks: int) -> int:
    """Of a buffer of `total` bytes, each rank passes 2·(n−1)/n on."""
    return 2 * total * (ranks - 1) // ranks


def all_gather(total: int, ranks: int) -> int:
    """Of a joined buffer of `total` bytes, each rank passes (n−1)/n on; so does all_to_all of what a rank has."""
    return total * (ranks - 1) // ranks


def reduce_scatter(total: int, own: int) -> int:
    """Of a buffer of `total` bytes, a rank sends all but the `own` bytes that it keeps."""
    return total - own


def broadcast(total: int, ranks: int, index: int) -> int:
    """The whole buffer to each child in a binomial tree, by the rank `index` steps after the source."""
    return total * children(index, ranks)


def children(index: int, ranks: int) -> int:
    """To how many ranks the rank `index` steps after the source passes a broadcast on, in a binomial tree."""
    lowest = index & -index or 1 << ranks.bit_length()
    return sum(1 for bit in range(ranks.bit_length()) if 1 << bit < lowest and index | 1 << bit < ranks)
