"""The view of a run from another process: before it starts, while it goes on, when it has ended."""

import io
import json

from made_ranks import add_ranks
from made_run import make_run
from rich.console import Console

from tozan.report.watch import Watch


def console():
    return Console(file=io.StringIO(), force_terminal=True, width=100, height=40, color_system=None)


def frame(watch):
    watch._console.file.seek(0)
    watch._console.file.truncate()
    watch.once()
    return watch._console.file.getvalue()


def test_it_may_begin_before_the_run(tmp_path):
    watch = Watch(tmp_path / "run", console())
    assert "waiting for" in frame(watch)
    add_ranks(make_run(tmp_path / "run", 60), 16, 60, slow=5)
    said = frame(watch)
    assert "60/60" in said
    assert "16 processes" in said
    assert "done" in said
    assert "slow: rank 5" in said
    assert "pipeline bubble" in said
    assert "waiting for dp" in said
    assert "no checkpoint yet" in said


def test_it_follows_the_file_line_by_line(tmp_path):
    whole = make_run(tmp_path / "made", 40)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    run = tmp_path / "run"
    run.mkdir()
    facts = json.loads((whole / "run.json").read_text()) | {"steps": 40, "processes": 1}
    (run / "run.json").write_text(json.dumps(facts))
    watch = Watch(run, console())
    text = "".join(lines[:-1])
    half = text.index('"step": 11,') + 3
    (run / "metrics.jsonl").write_text(text[:half])
    assert "step 10/40" in frame(watch)
    assert not watch.done
    with (run / "metrics.jsonl").open("a") as file:
        file.write(text[half:])
    (run / "checkpoints" / "step-00000040").mkdir(parents=True)
    said = frame(watch)
    assert "step 40/40" in said
    assert "last checkpoint 0." in said
    assert watch.done
