"""What tensor parallelism sends while micro-batches pass through the model, booked layer by layer (see `traffic`)."""

from __future__ import annotations

from tozan.models.arithmetic import block_matrices
from tozan.planner.books import CHUNK_ELEMENTS, Books, residual


def passes(books: Books) -> None:
    """All micro-batches of a step, forward and backward."""
    trip = books.trip
    stage, last = books.here["pp"], trip.layout.pp - 1
    blocks = sum(map(len, trip.pieces(stage)))
    _ring(books, blocks * trip.accumulate)
    if trip.layout.tp == 1:
        return
    scheme = Flat(books) if trip.layout.scheme == "1d" else Grid(books)
    scheme.blocks(blocks * trip.accumulate)
    shared = trip.shape.tied and last > 0
    if stage == 0:
        scheme.embedding(trip.accumulate, backward=not shared)
    if stage == last:
        scheme.head(trip.accumulate, weights=not shared)
        if shared:
            # The last stage makes both gradients of a tied embedding: the head once more, and the table.
            scheme.head(trip.accumulate, inputs=False)
            scheme.embedding(trip.accumulate, backward=True)


def _ring(books: Books, times: int) -> None:
    """Keys and values on their way round in attention, forward and backward, and their gradients behind them."""
    trip, axis = books.trip, books.axis("cp")
    moved = 2 * trip.micro_batch * trip.tokens * trip.shape.kv_width // trip.layout.tp
    again, hops = 1 if books.recompute == "full" else 0, axis.size - 1
    books.add(axis, "send", "keys and values", moved * trip.item, (2 + again) * times * hops)
    books.add(axis, "send", "gradients of keys and values", moved * max(trip.item, 4), times * hops)


class Flat:
    """1D tensor parallelism, with sequence parallelism if asked for."""

    def __init__(self, books: Books) -> None:
        self.books, trip = books, books.trip
        self.whole = trip.micro_batch * trip.tokens * trip.shape.width
        self.own = self.whole // trip.layout.tp

    def blocks(self, times: int) -> None:
        """Two pairs of products in each block."""
        trip, books = self.books.trip, self.books
        enters = {"none": 0, "full": 2, "selective": 2 if trip.shape.family == "gpt2" else 1}[books.recompute]
        leaves = 1 if books.recompute == "full" else 0  # recomputation stops before the last sum
        if trip.sequence_parallel:
            books.gather(books.tensor, "tp enter", self.whole, trip.item, (2 + enters) * times)
            books.scatter(books.tensor, "tp leave", self.whole, self.own, trip.item, (2 + leaves) * times)
            books.gather(books.tensor, "tp leave", self.whole, trip.item, 2 * times)
            books.scatter(books.tensor, "tp enter", self.whole, self.own, trip.item, 2 * times)
        else:
            books.all_reduce(books.tensor, "tp leave", self.whole, trip.item, (2 + leaves) * times)
            books.all_reduce(books.tensor, "tp enter", self.whole, trip.item, 2 * times)

    def embedding(self, times: int, backward: bool) -> None:
        """Rows of the table looked up by each rank and summed."""
        books = self.books
        if not books.trip.sequence_parallel:
            books.all_reduce(books.tensor, "tp leave", self.whole, self.books.trip.state_item, times)
            return
        books.scatter(books.tensor, "tp leave", self.whole, self.own, self.books.trip.state_item, times)
        if backward:
            books.gather(books.tensor, "tp leave", self.whole, self.books.trip.state_item, times)

    def head(self, times: int, inputs: bool = True, weights: bool = True) -> None:  # noqa: ARG002
        """Statistics of the logits, chunk by chunk, and the gradient of the head's input."""
        trip, books = self.books.trip, self.books
        tokens, ranks = trip.micro_batch * trip.tokens, trip.layout.tp
        for rows in chunks(tokens, trip.shape.vocabulary // ranks):
            books.gather(books.tensor, "softmax statistics", 3 * rows * ranks, self.books.trip.state_item, times)
        if trip.sequence_parallel:
            books.gather(books.tensor, "tp enter", self.whole, trip.item, times)
            if inputs:
                books.scatter(books.tensor, "tp enter", self.whole, self.own, trip.item, times)
        elif inputs:
            books.all_reduce(books.tensor, "tp enter", self.whole, trip.item, times)


class Grid:
    """2D and 2.5D tensor parallelism: SUMMA's panels and sums, and the statistics of norms."""

    def __init__(self, books: Books) -> None:
        self.books, trip = books, books.trip
        self.side = trip.layout.grid
        self.tokens = trip.micro_batch * trip.tokens // (self.side * trip.layout.tp_depth)

    def blocks(self, times: int) -> None:
        """Every product of a block and its two norms."""
        trip, q = self.books.trip, self.side
        gpt2 = trip.shape.family == "gpt2"
        again = {
            "none": set(),
            "full": {*block_matrices(trip.shape), "norm1", "norm2"},
            "selective": {"attn.qkv", "norm1"} | ({"mlp.fc", "mlp.proj", "norm2"} if gpt2 else {"mlp.down"}),
        }[self.books.recompute]
        for name, (outputs, inputs) in block_matrices(trip.shape).items():
            x, weight = self.tokens * inputs // q, outputs * inputs // q**2
            self.nn(x, weight, trip.item, (2 if name in again else 1) * times)
            self.nt(weight, x, trip.item, times)
            self.tn(x, weight, trip.item, times)
        for name in ("norm1", "norm2"):
            self.norm((2 if name in again else 1) * times, times)

    def nn(self, a: int, b: int, item: int, times: int) -> None:
        """A·B of blocks of so many elements: panels of both."""
        self.books.panels(self.books.columns, a, item, times)
        self.books.panels(self.books.rows, b, item, times)

    def nt(self, b: int, part: int, item: int, times: int) -> None:
        """A·Bᵀ: panels of B along the column, and parts of the product summed along the row."""
        self.books.panels(self.books.rows, b, item, times)
        self.books.sums(self.books.columns, part, item, times)

    def tn(self, a: int, part: int, item: int, times: int) -> None:
        """Aᵀ·B: panels of A, and parts of the product summed along the column."""
        self.books.panels(self.books.columns, a, item, times)
        self.books.sums(self.books.rows, part, item, times)

    def norm(self, forward: int, backward: int) -> None:
        """Mean and variance of every token (one number for RMSNorm), and their gradients."""
        numbers = (2 if self.books.trip.shape.family == "gpt2" else 1) * self.tokens
        columns = self.books.columns
        self.books.gather(columns, "norm statistics", numbers * columns.size, self.books.trip.state_item, forward)
        self.books.all_reduce(columns, "norm gradient", numbers, self.books.trip.state_item, backward)

    def embedding(self, times: int, backward: bool) -> None:
        """Rows of the table looked up for the samples of a grid column, and scattered."""
        own = residual(self.books.trip)
        self.books.scatter(self.books.rows, "embedding", own * self.side, own, self.books.trip.state_item, times)
        if backward:
            self.books.gather(self.books.rows, "embedding", own * self.side, self.books.trip.state_item, times)

    def head(self, times: int, inputs: bool = True, weights: bool = True) -> None:
        """The final norm, the products with the vocabulary chunk by chunk, and the loss."""
        trip, books, q = self.books.trip, self.books, self.side
        self.norm(times, times if inputs else 0)
        columns = trip.shape.vocabulary // q
        table = columns * trip.shape.width // q
        for rows in chunks(self.tokens, columns):
            logits = rows * columns
            self.nt(table, logits, trip.item, times)
            books.gather(books.columns, "softmax statistics", 3 * rows * q, self.books.trip.state_item, times)
            if inputs:
                self.nn(logits, table, trip.head_item, times)
            if weights:
                self.tn(logits, table, trip.head_item, times)
        for axis in (books.rows, books.axis("tp_depth")):
            books.all_reduce(axis, "loss", 1, self.books.trip.state_item, times)


def chunks(tokens: int, columns: int) -> list[int]:
    """Tokens of each chunk of logits of so many columns."""
    size = max(1, CHUNK_ELEMENTS // columns)
    return [min(size, tokens - start) for start in range(0, tokens, size)]
