"""Where ranks sit on a torus: a map of patches, as of countries, in which neighbouring groups never share a colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod

import numpy as np
from matplotlib.axes import Axes

from tozan.report.drawing import Figure, figure, rows_csv
from tozan.report.marks import MUTED, SERIES, Cell, bare, cells, key

MOST_CELLS = 4_096
LARGEST = 10**7
"""Nodes of a torus up to which it is drawn."""
BORDER, SEAM = 0.1, 0.02
"""Half the space between nodes of different groups, and between those of one."""

Square = tuple[int, int]
Slices = dict[int, dict[Square, int]]
"""By number of a slice: the rank at each place of it."""


def torus(
    shape: Sequence[int], places: Mapping[int, Sequence[int]], group: Mapping[int, int], axis: str
) -> Figure | None:
    """Which rank sits where on a torus, as its slices side by side; the ranks of a group form patches of one colour.

    Args:
        shape: lengths of the torus.
        places: coordinates of each rank's node.
        group: number of each rank's group along `axis`.
        axis: the mesh axis whose groups are coloured.
    """
    if not shape or not places or prod(shape) > LARGEST:
        return None
    across, down = (shape[0], shape[1]) if len(shape) > 1 else (shape[0], 1)
    slices = prod(shape[2:]) if len(shape) > 2 else 1
    shown = min(slices, max(1, MOST_CELLS // (across * down)))
    columns = max(1, min(shown, round((shown * 1.8 * down / across) ** 0.5) or 1))
    rows = ceil(shown / columns)
    by_slice = _slices(shape, places, shown)
    colours = _colours(by_slice, group)
    known = sorted(colours)
    numbered = across * columns <= 16

    def draw(axes: Axes, narrow: bool) -> None:
        filled = []
        for number, squares in by_slice.items():
            left, top = number % columns * (across + 0.7), number // columns * (down + 0.9)
            for (x, y), rank in squares.items():
                filled.append(_cell(squares, group, (x, y), (left, top), colours[group.get(rank, 0)]))
                if numbered and not narrow:
                    axes.annotate(str(rank), (left + x + 0.5, top + y + 0.52), ha="center", va="center", fontsize=9.6)
        cells(axes, filled)
        axes.set_xlim(-0.1, columns * (across + 0.7))
        axes.set_ylim(rows * (down + 0.9), -0.1)
        axes.set_aspect("equal")
        bare(axes)
        axes.yaxis.set_visible(False)
        if len(known) <= len(SERIES):
            key(axes, [(f"{axis} {one}", colours[one]) for one in known], narrow)
        axes.set_title(f"slices of {across} × {down} nodes", loc="left", fontsize=10.5, color=MUTED, pad=6)

    sides, many = " × ".join(map(str, shape)), len(set(group.values()))
    said = f"a patch of one colour is one of {many:,} {axis} groups"
    said += "; colours repeat, but never side by side. " if many > len(SERIES) else ". "
    drawn = [rank for squares in by_slice.values() for rank in squares.values()]
    hops = farthest(shape, [places[rank] for rank in drawn], [group.get(rank, 0) for rank in drawn])
    said += f"Two ranks of a group are at most {hops} hop{'' if hops == 1 else 's'} apart."
    words = f"{len(places):,} ranks on a torus of {sides} nodes, in {slices:,} slices of {across} × {down}; {said}"
    data = rows_csv(
        ("rank", *(f"x{i}" for i in range(len(shape))), f"{axis}_group"),
        [(rank, *place, group.get(rank, 0)) for rank, place in sorted(places.items())],
    )
    caption = f"A square is a rank, a block a slice of the torus ({sides}), {said}"
    if shown < slices:
        caption += f" The first {shown} of {slices} slices."
    height = min(620.0, max(120.0, 40 + 540.0 * rows * (down + 0.9) / (columns * (across + 0.7))))
    return figure("torus", "Where the ranks sit", words, draw, data, caption, height)


def _slices(shape: Sequence[int], places: Mapping[int, Sequence[int]], shown: int) -> Slices:
    """The first slices across all but the first two dimensions."""
    found: Slices = {}
    for rank, place in places.items():
        number = 0
        for length, coordinate in zip(shape[2:], place[2:], strict=True):
            number = number * length + int(coordinate)
        if number < shown:
            found.setdefault(number, {})[int(place[0]), int(place[1]) if len(place) > 1 else 0] = rank
    return found


def _colours(by_slice: Slices, group: Mapping[int, int]) -> dict[int, str]:
    """A colour for each group: its own while there are enough, else one that no neighbour in a slice has.

    Greedy, the least used colour first, in the order of the groups: with nine colours and patches on a plane there is
    nearly always one left; where there is not, the least used one is taken.
    """
    beside: dict[int, set[int]] = {}
    for squares in by_slice.values():
        for (x, y), rank in squares.items():
            mine = group.get(rank, 0)
            around = {group.get(squares[at], 0) for at in _around(x, y) if at in squares}
            beside.setdefault(mine, set()).update(around - {mine})
    if len(set(group.values())) <= len(SERIES):
        return {one: SERIES[place] for place, one in enumerate(sorted(set(group.values())))}
    used, found = dict.fromkeys(SERIES, 0), dict[int, str]()
    for one in sorted(beside):
        taken = {found[other] for other in beside[one] if other in found}
        free = [colour for colour in SERIES if colour not in taken] or list(SERIES)
        found[one] = min(free, key=lambda colour: used[colour])
        used[found[one]] += 1
    return found


def _around(x: int, y: int) -> list[Square]:
    """The eight squares that touch a square."""
    return [(x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]


def _cell(
    squares: Mapping[Square, int], group: Mapping[int, int], at: Square, corner: tuple[float, float], colour: str
) -> Cell:
    """A node: close to those of its group, apart from others."""
    mine = group.get(squares[at], 0)

    def gap(i: int, j: int) -> float:
        other = squares.get((at[0] + i, at[1] + j))
        return SEAM if other is not None and group.get(other, 0) == mine else BORDER

    left, top = corner[0] + at[0] + gap(-1, 0), corner[1] + at[1] + gap(0, -1)
    width, height = 1.0 - gap(-1, 0) - gap(1, 0), 1.0 - gap(0, -1) - gap(0, 1)
    return Cell(left, top, width, height, colour, 0.62)


def farthest(shape: Sequence[int], places: Sequence[Sequence[int]], group: Sequence[int]) -> int:
    """The most hops between two ranks of the same group.

    Args:
        shape: lengths of the torus; each dimension is a ring.
        places: coordinates of each rank.
        group: of each rank.
    """
    at, of, lengths = np.array(places), np.array(group), np.array(shape)
    most = 0
    for one in np.unique(of):
        mine = np.unique(at[of == one], axis=0)
        for start in range(0, len(mine), 256):  # pairs of a large group at once would fill memory
            apart = np.abs(mine[start : start + 256, None] - mine[None])
            most = max(most, int(np.minimum(apart, lengths - apart).sum(-1).max()))
    return most
