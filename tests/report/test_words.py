import pytest

from tozan.report import history, words


@pytest.mark.parametrize(
    ("value", "text"), [(798_720, "798,720"), (10_100_480, "10.1 million"), (1.3e9, "1.3 billion")]
)
def test_amount(value, text):
    assert words.amount(value) == text


def test_the_summary_says_what_how_far_and_how_fast(run_folder):
    text = " ".join(words.summary(history.read(run_folder(390))))
    for part in (
        "GPT-2 style transformer of 10.1 million parameters",
        "390 steps", "798,720 tokens", "Python 3.11 standard library",
        "fell from 9.01 to 4.33", "tokens/s", "resumed once", "1 step was skipped",
    ):  # fmt: skip
        assert part in text


def test_a_loss_that_rose_is_not_called_a_fall(run_folder):
    found = history.read(run_folder(20))
    found.evals["loss"][:] = range(1, found.evals["loss"].size + 1)
    assert "did not fall" in " ".join(words.summary(found))
