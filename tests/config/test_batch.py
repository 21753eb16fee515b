"""The batch equation, held to its definition over all small numbers."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tozan.config.batch import ContradictionError, solve

size = st.integers(1, 24)
maybe = st.none() | size


@given(maybe, maybe, st.none() | st.integers(1, 600), st.integers(1, 6), st.sampled_from([1, 256, 1024, 8192]))
def test_solved_or_truly_unsolvable(
    micro: int | None, accumulate: int | None, total: int | None, data: int, sequence: int
) -> None:
    possible = total is None or any(
        m * a * data == total
        for m in ([micro] if micro else range(1, total + 1))
        for a in ([accumulate] if accumulate else range(1, total // m + 1))
    )
    try:
        batch = solve(micro, accumulate, total, data, sequence)
    except ContradictionError:
        assert not possible
        return
    assert batch.global_batch == batch.micro_batch * batch.accumulate * data
    given_and_found = zip(
        (micro, accumulate, total), (batch.micro_batch, batch.accumulate, batch.global_batch), strict=True
    )
    assert all(given in (None, found) for given, found in given_and_found)
    named = {"micro_batch": micro, "accumulate": accumulate, "global_batch": total}
    assert set(batch.how) == {name for name, value in named.items() if value is None}


@pytest.mark.parametrize(("sequence", "micro"), [(256, 16), (1024, 4), (2048, 2), (4096, 1), (100_000, 1)])
def test_default_micro_batch_holds_4096_tokens(sequence: int, micro: int) -> None:
    assert solve(None, None, None, 1, sequence).micro_batch == micro
    assert solve(None, None, 512, 1, sequence).micro_batch == micro


@given(size, size, st.integers(1, 600), st.integers(1, 6))
def test_every_offer_of_a_contradiction_works(micro: int, accumulate: int, total: int, data: int) -> None:
    assume(total != micro * accumulate * data)
    with pytest.raises(ContradictionError) as caught:
        solve(micro, accumulate, total, data, 1024)
    equation = f"global_batch {total} ≠ micro_batch {micro} × accumulate {accumulate} × data {data}"
    assert str(caught.value).startswith(equation)
    for offer in caught.value.fix.removeprefix("write ").partition(", or leave")[0].split(" or "):
        name, _, number = offer.partition(" = ")
        sizes = {"micro_batch": micro, "accumulate": accumulate, "global_batch": total} | {name: int(number)}
        solve(sizes["micro_batch"], sizes["accumulate"], sizes["global_batch"], data, 1024)


@pytest.mark.parametrize(
    ("sizes", "data", "equation", "fix"),
    [
        ((4, 8, 256), 1, "256 ≠ micro_batch 4 × accumulate 8 × data 1 = 32", "global_batch = 32 or accumulate = 64"),
        (
            (4, None, 250),
            1,
            "250 ≠ micro_batch 4 × data 1 × accumulate",
            "global_batch = 248 or 252 or micro_batch = 5",
        ),
        ((None, 7, 250), 2, "250 ≠ accumulate 7 × data 2 × micro_batch", "global_batch = 238 or 252 or accumulate = 5"),
        ((None, None, 250), 4, "250 ≠ data 4", "global_batch = 248 or 252"),
        ((None, None, 3), 4, "3 ≠ data 4", "global_batch = 4"),
    ],
)
def test_contradiction(sizes: tuple[int | None, ...], data: int, equation: str, fix: str) -> None:
    with pytest.raises(ContradictionError) as caught:
        solve(*sizes, data, 1024)
    assert equation in str(caught.value)
    assert fix in caught.value.fix
