"""The ranks that save together: how they agree before a save, and how the writers tell that they are done.

Two ways to talk, because the writers run beside training. `exchange` is for the main threads, between two steps, and
may be a collective. `tell` and `hear` are for the writers' threads: a collective there would be mixed up with the
training's own, so they go through a store that any thread may use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

from tozan.errors import Problem, UserError


class Broken(Exception):  # noqa: N818 - what ended the crew is the error
    """A rank that was waited for is gone."""


class Crew(Protocol):
    """What a saver needs of the job.

    Attributes:
        rank: this process; rank 0 makes the folder, writes the manifest and gives the checkpoint its name.
        size: processes that save together.
    """

    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102

    def exchange(self, text: str) -> list[str]:
        """Every rank's text, by rank; all ranks call this at the same point of their main threads."""

    def tell(self, key: str, text: str) -> None:
        """Leave this rank's text under a key; from any thread, waits for nobody."""

    def hear(self, key: str) -> list[str]:
        """Every rank's text under a key, by rank, once all have told theirs; from any thread, once per key.

        Raises:
            Broken: the crew broke up while this waited.
        """

    def part(self, key: str) -> None:
        """Wait until rank 0 has come here, which has then heard all; from any thread, once per key.

        Raises:
            Broken: as in `hear`.
        """

    def breaks(self, error: BaseException) -> bool:
        """Told that this rank leaves with an error: does that mean that others are gone? `hear` then gives up."""


class Alone:
    """A crew of one."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self._told: dict[str, str] = {}

    def exchange(self, text: str) -> list[str]:  # noqa: D102
        return [text]

    def tell(self, key: str, text: str) -> None:  # noqa: D102
        self._told[key] = text

    def hear(self, key: str) -> list[str]:  # noqa: D102
        return [self._told.pop(key)]

    def part(self, key: str) -> None:  # noqa: D102
        pass

    def breaks(self, error: BaseException) -> bool:  # noqa: ARG002, D102
        return False


def settle(crew: Crew, error: BaseException | None, text: str = "") -> str:
    """Every rank says whether all is well with it; a main thread's call, at the same point on all ranks.

    Returns:
        Rank 0's `text`.

    Raises:
        UserError: the same on every rank, if any had one: names rank, file and cause.
        BaseException: this rank's own error, if it is not a user's mistake; the others get a UserError about it.
    """
    if error is not None and (crew.size == 1 or not isinstance(error, UserError)):
        if crew.size > 1:
            crew.exchange(json.dumps({"text": "", "problems": told(crew.rank, error)}))
        raise error
    said = [json.loads(each) for each in crew.exchange(json.dumps({"text": text, "problems": told(crew.rank, error)}))]
    found = problems(said)
    if found:
        raise UserError(*found)
    return str(said[0]["text"])


def pool(crew: Crew, found: Sequence[Problem]) -> list[Problem]:
    """Every rank's problems, the same list on all ranks; a main thread's call, at the same point on all of them."""
    own = {"problems": [(problem.where, problem.what, problem.fix) for problem in found]}
    return problems([json.loads(text) for text in crew.exchange(json.dumps(own))])


def told(rank: int, error: BaseException | None) -> list[tuple[str, str, str]]:
    """An error as it is told to other ranks; nothing for None."""
    if error is None:
        return []
    if not isinstance(error, UserError):
        return [(f"rank {rank}", f"{type(error).__name__}: {error}", "the rank's own output has the traceback")]
    return [(problem.where, problem.what, problem.fix) for problem in error.problems]


def problems(said: Sequence[dict[str, list[list[str]]]]) -> list[Problem]:
    """What several ranks have told; what all of them know is said once."""
    return list(dict.fromkeys(Problem(*each) for one in said for each in one["problems"]))
