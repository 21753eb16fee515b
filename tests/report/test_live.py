import io
from pathlib import Path

import pytest
from rich.console import Console

from tozan.report.history import records
from tozan.report.live import Live, sparkline


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False, color_system=None)


def play(live: Live, folder: Path) -> str:
    with live:
        for record in records(folder / "metrics.jsonl"):
            live.record(record)
        view = live._console.file
    return view.getvalue()  # type: ignore[attr-defined]


def test_a_log_file_gets_plain_lines_and_few_of_them(run_folder):
    said = play(Live(390, console(terminal=False), every=3600), run_folder(390))
    assert "\x1b" not in said
    lines = said.splitlines()
    assert sum("tokens/s" in line for line in lines) == 2, "the first step and the last"
    assert any(line.startswith("step 390/390  loss 4.") and line.endswith("done") for line in lines)
    assert any("held-out loss" in line and "perplexity" in line for line in lines)
    assert "step 234  resumed: from step-00000234" in lines
    assert "step 40  skipped: gradient of blocks.3.attn.qkv.weight is inf" in lines


def test_a_screen_gets_the_numbers_and_the_time_left(run_folder):
    live = Live(390, console(terminal=True))
    said = play(live, run_folder(390))
    assert "tokens/s" in said
    assert "held-out" in said
    assert "done" in said
    assert "█" in said


def test_time_left_is_the_mean_step_times_the_steps_left():
    live = Live(100, console(terminal=False))
    for step, seconds in enumerate([5.0, 1.0, 1.0, 1.0], start=1):
        live.record({"kind": "step", "step": step, "loss": 1.0, "seconds": seconds})
    assert live.seconds_left == pytest.approx(2.0 * 96)


def test_numbers_that_are_missing_are_shown_as_a_dash():
    live = Live(10, console(terminal=False))
    live.record({"kind": "step", "step": 1, "loss": None, "skipped": "loss is nan"})
    assert "loss —" in live._console.file.getvalue()


def test_sparkline_goes_from_lowest_to_highest():
    assert sparkline([]) == ""
    assert sparkline([3.0]) == "▁"
    assert sparkline([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == "▁▂▃▄▅▆▇█"
    assert len(sparkline([float(value) for value in range(1000)])) == 48
