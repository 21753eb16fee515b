"""Samples for training: windows on the stream of tokens, in an order that depends on the seed alone."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from tozan.data import order
from tozan.data.manifest import Manifest
from tozan.data.reader import DamagedError, Shard
from tozan.data.verify import check_lengths, check_shard, check_tokenizer
from tozan.errors import Problem, UserError

Samples = npt.NDArray[np.int64]

ATTEMPTS = 64
"""Stand-ins tried for a sample that cannot be read before the data set counts as lost."""
REPORTED = 1000
"""Damaged members remembered one by one."""


class Dataset:
    """One split of a data set, read where it lies.

    The documents of the split, each followed by the end token, form a circular stream of N tokens. An epoch has
    N // sequence windows of `sequence` + 1 tokens (the last one is the target of the one before it, and the first of
    the next window); it visits each once. Sample numbers run on over all epochs, and any sample is reached at once.

    Attributes:
        windows: samples in one epoch.
        vocabulary: every token is below this.
        tokens: length N of the stream.
        bytes_per_token: bytes of text for each token of the stream.
        skipped: samples replaced so far because their own window could not be read (`on_bad="skip"`).
        problems: the damage met so far, each member once.
    """

    def __init__(self, path: Path, manifest: Manifest, split: str, *, sequence: int, seed: int, skip: bool) -> None:
        """Use `open`, which checks what is there."""
        self._path = path
        self._manifest = manifest
        self._sequence = sequence
        self._seed = seed
        self._skip = skip
        self._entries = manifest.of(split)
        self._ends = np.cumsum([entry.tokens for entry in self._entries], dtype=np.int64)
        self._checked: dict[int, bytearray] = {}
        self._lost: dict[int, list[Problem]] = {}
        self._open: OrderedDict[int, Shard] = OrderedDict()
        # Each open shard holds two files; leave most of what this process may open to others.
        self._open_limit = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)
        self._lock = threading.Lock()
        self.tokens = int(self._ends[-1]) if len(self._ends) else 0
        self.windows = self.tokens // sequence
        self.vocabulary = manifest.vocabulary
        self.bytes_per_token = sum(entry.bytes for entry in self._entries) / max(1, self.tokens)
        self.tokenizer_sha256 = manifest.tokenizer_sha256
        self.tokenizer_json = b""
        self.skipped = 0
        self.problems: dict[str, Problem] = {}

    @classmethod
    def open(
        cls,
        path: Path | str,
        split: Literal["train", "validation"],
        *,
        sequence: int,
        seed: int,
        verify: Literal["members", "full"] = "members",
        on_bad: Literal["refuse", "skip"] = "refuse",
    ) -> Self:
        """Opens a split of a finished data set.

        Opening looks at the manifest, the tokenizer and the length of every file; each index is checked when its
        shard is first used, and each member when it is first read.

        Args:
            path: folder written by `build`.
            split: `train` or `validation`.
            sequence: tokens in a sample, without the last target.
            seed: chooses the order of samples.
            verify: `full` also checks every file's SHA-256 and every member now.
            on_bad: `skip` replaces samples that cannot be read by others, the same ones in every process.

        Raises:
            UserError: the data set is not whole (all that is wrong is named), or the split has less than one sample.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        tokenizer = check_tokenizer(path, manifest)
        check = check_shard if verify == "full" else check_lengths
        problems = [problem for entry in manifest.of(split) for problem in check(path, entry, manifest)]
        dataset = cls(path, manifest, split, sequence=sequence, seed=seed, skip=on_bad == "skip")
        dataset.tokenizer_json = tokenizer
        if problems and on_bad == "refuse":
            raise UserError(*problems)
        dataset.problems = {problem.where: problem for problem in problems}
        if dataset.tokens <= sequence:
            rule = f"the {split} split has {dataset.tokens:,} tokens; a sample of {sequence:,} needs {sequence + 1:,}"
            raise UserError(Problem(str(path), rule, "shorten model.sequence, or build from more text"))
        return dataset

    def samples(self, first: int, count: int) -> Samples:
        """Some samples of the endless order.

        Args:
            first: number of the first one, counted from 0 over all epochs.
            count: how many.

        Returns:
            (count, sequence + 1) tokens. They depend on the seed and the sample's number only.

        Raises:
            UserError: a member is damaged and `on_bad` is `refuse`, or too many are to replace a sample.
        """
        if first < 0 or count < 0:
            raise ValueError(f"samples({first}, {count}): neither may be negative")
        found = np.empty((count, self._sequence + 1), dtype=np.int64)
        for row, start in enumerate(self._starts(first, count, 0)):
            if not self._try(start, found[row]):
                self._stand_in(first + row, found[row])
        return found

    def in_order(self, count: int) -> Samples:
        """The first windows of the stream, unshuffled: always the same ones, for evaluation.

        Args:
            count: how many are wanted; a small split has fewer.

        Returns:
            (up to count, sequence + 1) tokens; windows that cannot be read are left out if `on_bad` is `skip`.
        """
        count = max(0, min(count, (self.tokens - 1) // self._sequence))
        found = np.empty((count, self._sequence + 1), dtype=np.int64)
        whole = [self._try(row * self._sequence, found[row]) for row in range(count)]
        readable: Samples = found[np.array(whole, dtype=bool)]
        return readable

    def _starts(self, first: int, count: int, attempt: int) -> list[int]:
        windows, sequence = self.windows, self._sequence
        return order.starts(first, count, windows=windows, sequence=sequence, seed=self._seed, attempt=attempt)

    def _try(self, start: int, out: Samples) -> bool:
        """Reads a window; says whether it could, if damage is to be skipped."""
        try:
            self._fill(start % self.tokens, out)
        except DamagedError as error:
            if not self._skip:
                raise
            with self._lock:
                for problem in error.problems[: REPORTED - len(self.problems)]:
                    self.problems.setdefault(problem.where, problem)
            return False
        return True

    def _stand_in(self, number: int, out: Samples) -> None:
        """Replaces a sample by the first readable one of its stand-ins, which follow from the seed and its number."""
        for attempt in range(1, ATTEMPTS + 1):
            if self._try(self._starts(number, 1, attempt)[0], out):
                with self._lock:
                    self.skipped += 1
                return
        rule = f"sample {number:,} and {ATTEMPTS} stand-ins for it cannot be read; too much is damaged to go on"
        raise UserError(Problem(str(self._path), rule, "see `tozan data verify`"), *list(self.problems.values())[:20])

    def _fill(self, position: int, out: Samples) -> None:
        """Copies `len(out)` tokens from a position of the circular stream."""
        filled = 0
        while filled < len(out):
            number = int(np.searchsorted(self._ends, position, side="right"))
            filled += self._from_shard(number, position - self._begin(number), out[filled:])
            position = int(self._ends[number]) % self.tokens

    def _begin(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    def _from_shard(self, number: int, position: int, out: Samples) -> int:
        """Copies tokens from a position in a shard's stream up to the shard's end; returns how many."""
        shard = self._shard(number)
        start = shard.index.start
        wanted = min(len(out), int(start[-1]) - position)
        document = int(np.searchsorted(start, np.uint64(position), side="right")) - 1
        filled = 0
        while filled < wanted:
            begin, end = int(start[document]), int(start[document + 1]) - 1
            first = position + filled - begin
            last = min(end - begin, first + wanted - filled)
            if last > first:
                out[filled : filled + last - first] = shard.tokens(document, first, last)
                filled += last - first
            if filled < wanted:
                out[filled] = self._manifest.end
                filled += 1
            document += 1
        return wanted

    def _shard(self, number: int) -> Shard:
        """An open shard; the ones used last stay open, and one that cannot be opened is not tried again."""
        with self._lock:
            if number in self._lost:
                raise DamagedError(*self._lost[number])
            shard = self._open.get(number)
            if shard is None:
                entry = self._entries[number]
                checked = self._checked.setdefault(number, bytearray(entry.documents))
                try:
                    shard = Shard(self._path, entry, self._manifest, checked)
                except DamagedError as error:
                    self._lost[number] = error.problems
                    raise
                self._open[number] = shard
                if len(self._open) > self._open_limit:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
            return shard

    def close(self) -> None:
        """Lets go of all files; the next read opens them again."""
        with self._lock:
            self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
