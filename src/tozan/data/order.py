"""The order of samples: a keyed permutation that needs no memory and reaches any sample at once.

Each epoch visits every window exactly once, in an order that is a function of the seed, the epoch and the number of
windows. The permutation is a balanced Feistel network over the next power of four, restricted to the windows by
cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002): whatever falls outside is
sent through the network again until it falls inside.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

ROUNDS = 8
"""Four rounds make a Feistel network a good permutation on large domains (Luby and Rackoff); small ones want more."""

Unsigned = npt.NDArray[np.uint64]


def derive(*parts: int | str, count: int = 1) -> Unsigned:
    """Keys made from a seed and a purpose.

    Args:
        parts: what the keys are for, such as `(seed, "phase", epoch)`.
        count: how many keys, at most 8.

    Returns:
        `count` numbers of 64 bits that look random and depend on nothing else.
    """
    message = "\0".join(map(str, parts)).encode()
    return np.frombuffer(hashlib.blake2b(message, digest_size=8 * count).digest(), dtype="<u8").astype(np.uint64)


def _mix(value: Unsigned) -> Unsigned:
    """Spreads every input bit over all 64 output bits (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(positions: Unsigned, count: int, keys: Unsigned) -> Unsigned:
    """Sends each position below `count` to its place in the permutation that `keys` choose.

    Args:
        positions: (N,) positions, each below `count`.
        count: size of the permuted set, at least 1 and at most 2**62.
        keys: (ROUNDS,) round keys from `derive`.

    Returns:
        (N,) places below `count`; over all positions each place occurs exactly once.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    places = positions.astype(np.uint64)
    outside = np.ones(len(places), dtype=bool)
    while outside.any():
        left, right = places[outside] >> half, places[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        places[outside] = (left << half) | right
        outside = places >= np.uint64(count)
    return places


def starts(first: int, count: int, *, windows: int, sequence: int, seed: int, attempt: int = 0) -> list[int]:
    """Where samples begin in the circular stream of tokens.

    Window w of an epoch begins at `phase + w × sequence`; the phase differs from epoch to epoch, so that window
    borders do, too. `attempt` above 0 names a sample's stand-ins, for when its own window cannot be read.

    Args:
        first: number of the first sample; samples are counted over all epochs, without end.
        count: how many samples.
        windows: windows in one epoch.
        sequence: tokens from one window's start to the next.
        seed: chooses the order.
        attempt: 0 for the sample itself, k for its k-th stand-in.

    Returns:
        `count` positions, not yet reduced modulo the length of the stream.
    """
    found: list[int] = []
    while count > 0:
        epoch, inside = divmod(first, windows)
        here = min(count, windows - inside)
        positions = np.arange(inside, inside + here, dtype=np.uint64)
        places = permute(positions, windows, derive(seed, "order", epoch, attempt, count=ROUNDS))
        phase = int(derive(seed, "phase", epoch)[0]) % sequence
        found += [phase + place * sequence for place in places.tolist()]
        first, count = first + here, count - here
    return found
