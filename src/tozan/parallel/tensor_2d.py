"""2D tensor parallelism (Optimus, arXiv 2104.05343): every matrix, activations too, in blocks on a q×q grid.

Rank (i, j) has rows i (of q parts) of the micro-batch's samples and part j of the width. Whole samples stay together
and so do whole heads, so attention needs no communication; products are SUMMA's, norms sum over a row of the grid, and
nothing but learned positions, norms and biases is held twice. Here for any depth d ≥ 1 of grids, which 2.5D adds (see
`tensor_2p5d.py`). Shapes in local form, B samples, T tokens, D width, V vocabulary (weight dims are outputs × inputs):

| role                | parameters           | activations                                           |
|---------------------|----------------------|-------------------------------------------------------|
| `qkv`, `col`, `row` | (out/q, in/q), bias (out/q) | (B/qd, T, in/q) to (B/qd, T, out/q)            |
| `vocab`             | (V/q, D/q)           | tokens (B, T) to (B/qd, T, D/q), or to the loss       |
| `norm`              | (D/q)                | (B/qd, T, D/q)                                        |
| `position`          | (T, D/q)             | (T) to (T, D/q)                                       |

Outputs and widths are cut along `tp_col`; inputs, the vocabulary and samples along `tp_row`, so a weight is stored as
the transpose of SUMMA's block (i, j).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tozan.comm import Axis, Mesh, functions
from tozan.errors import Problem, UserError
from tozan.layout import Role
from tozan.ops.products import compute_dtype
from tozan.parallel.norms import ShardedNorm
from tozan.parallel.scheme import CalledHead, Parameters
from tozan.parallel.summa import Grid, product_nn, product_nt, product_tn, summa, summa_nt
from tozan.parallel.vocabulary import own_rows, sharded_cross_entropy

SAMPLES, WIDTH = 0, -1
"""The dims of (B, T, D) that are sharded."""


class SummaLinear(nn.Module):
    """y = x·Wᵀ + b in blocks: (B/qd, T, in/q) to (B/qd, T, out/q)."""

    def __init__(self, parameters: Parameters, grid: Grid) -> None:
        super().__init__()
        self.weight = parameters["weight"]
        self.bias = parameters.get("bias")
        self.grid = grid
        self.product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = self._product

    def forward(self, x: Tensor) -> Tensor:
        """This rank's block of the product, in autocast's type if that is on."""
        return self.product(x.flatten(0, -2), self.weight, self.bias).view(*x.shape[:-1], -1)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = compute_dtype(x)
        y = summa(x.to(dtype), weight.to(dtype).T, self.grid)
        return y if bias is None else y + bias.to(dtype)


class GridEmbedding(nn.Module):
    """Looks tokens up in blocks of the embedding, (V/q, D/q) on each rank.

    The q ranks of a grid column have part j of the width of all rows among them. Each looks up the samples of all of
    them in its own rows, and a reduce-scatter over samples gives each rank the sum for its own.
    """

    def __init__(self, parameters: Parameters, scheme: Tensor2D) -> None:
        super().__init__()
        self.weight = parameters["weight"]
        self._scheme = scheme

    def forward(self, tokens: Tensor) -> Tensor:
        """All tokens (B, T) int64 to (B/qd, T, D/q)."""
        row = self._scheme.grid.row
        found = own_rows(self._scheme.own_grid(tokens), self.weight, row)
        return functions.reduce_scatter_to(found, row, dim=SAMPLES, name="embedding")


class GridProducts:
    """The output head's products in blocks: a `vocabulary.Head`."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.axis = grid.column

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """X·Wᵀ: logits of this rank's tokens, part j of the vocabulary."""
        return product_nt(x, weight, self.grid)

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """G·W, complete."""
        return product_nn(gradient, weight, self.grid)

    def weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Gᵀ·X, complete but for the sum over depth."""
        return product_tn(gradient, x, self.grid)


class Tensor2D:
    """The scheme: see the table at the top.

    Args:
        mesh: its axes `tp_row` and `tp_col` are the grid; `tp_depth`, of size 1 here, stacks grids.
    """

    axes: tuple[str, ...] = ("tp_row", "tp_col")
    token_axes: tuple[str, ...] = ("tp_row",)

    def __init__(self, mesh: Mesh) -> None:
        self.grid = Grid(mesh["tp_row"], mesh["tp_col"])
        self.depth: Axis = mesh["tp_depth"]

    @staticmethod
    def accepts(role: Role, module: nn.Module) -> str:
        """Norms must be torch's own, since their sums run over ranks."""
        kinds: dict[str, tuple[type[nn.Module], ...]] = {
            "norm": (nn.LayerNorm, nn.RMSNorm),
            "position": (nn.Embedding,),
            "vocab": (nn.Embedding, nn.Linear),
        }
        wanted = kinds.get(role, (nn.Linear,))
        return "" if isinstance(module, wanted) else " or ".join(f"nn.{kind.__name__}" for kind in wanted)

    def layer(self, role: Role, module: nn.Module, parameters: Parameters) -> nn.Module:
        """The sharded layer of a role."""
        if role in ("qkv", "col", "row"):
            return SummaLinear(parameters, self.grid)
        if role == "norm":
            return ShardedNorm(module, parameters, self.grid.column)
        if role == "vocab":
            return GridEmbedding(parameters, self) if isinstance(module, nn.Embedding) else CalledHead(parameters, self)
        module.weight = parameters["weight"]
        return module

    def output(self, x: Tensor, weight: Tensor, targets: Tensor | None, vocabulary: int) -> Tensor:
        """Loss without gathering logits; logits gathered (see `Scheme.output`)."""
        if targets is None:
            dtype = compute_dtype(x)
            logits = summa_nt(x.flatten(0, 1).to(dtype), weight.to(dtype), self.grid)
            return self.leave(logits.view(*x.shape[:2], -1))
        mine = self.own_samples(targets).flatten()
        loss = sharded_cross_entropy(x.flatten(0, 1), weight, mine, GridProducts(self.grid), vocabulary)
        loss = functions.reduce_from(loss, self.grid.row, name="loss")
        return functions.reduce_from(loss, self.depth, name="loss")

    def own_grid(self, samples: Tensor) -> Tensor:
        """The samples of this rank's grid: (B, ...) to (B/d, ...).

        Raises:
            UserError: B is no multiple of q·d.
        """
        rows = self.grid.side * self.depth.size
        if samples.shape[SAMPLES] % rows:
            rest = samples.shape[SAMPLES] % rows
            what = f"{samples.shape[SAMPLES]} samples over {rows} rows (depth × side) leaves {rest} over"
            raise UserError(Problem("micro-batch", what, f"use micro-batches that are multiples of {rows}"))
        return samples.chunk(self.depth.size)[self.depth.index]

    def own_samples(self, samples: Tensor) -> Tensor:
        """This rank's samples: (B, ...) to (B/qd, ...)."""
        return self.own_grid(samples).chunk(self.grid.side)[self.grid.row.index]

    def local_shape(self, batch: int, tokens: int, width: int) -> tuple[int, int, int]:
        """(B/qd, T, D/q)."""
        return batch // (self.grid.side * self.depth.size), tokens, width // self.grid.side

    def enter(self, x: Tensor) -> Tensor:
        """This rank's block of (B, T, D)."""
        x = functions.scatter_to(x, self.depth, dim=SAMPLES)
        x = functions.scatter_to(x, self.grid.row, dim=SAMPLES)
        return functions.scatter_to(x, self.grid.column, dim=WIDTH)

    def leave(self, x: Tensor) -> Tensor:
        """(B, T, D) from every rank's block."""
        x = functions.gather_from(x, self.grid.column, dim=WIDTH)
        x = functions.gather_from(x, self.grid.row, dim=SAMPLES)
        return functions.gather_from(x, self.depth, dim=SAMPLES)
