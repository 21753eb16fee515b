import json
import math
import tomllib

import pytest

from tozan import config, demo
from tozan.errors import UserError

TEXT = "The {0} of the mountain is {0}, and whoever climbs it by the {0} path sees the {1} from above.\n"
WORDS = [
    "ridge",
    "saddle",
    "summit",
    "valley",
    "meadow",
    "glacier",
    "boulder",
    "larch",
    "cedar",
    "shrine",
    "lantern",
    "river",
    "cloud",
    "spring",
]


def write_corpus(folder):
    """Some 700 kB in 60 files."""
    folder.mkdir()
    for number in range(60):
        lines = [TEXT.format(WORDS[(number + line) % 14], WORDS[number * line % 14]) for line in range(110)]
        (folder / f"{number:02}.txt").write_text(f"Chapter {number}\n\n" + "".join(lines))
    return folder


@pytest.mark.parametrize("rate", [50, 800, 3_700, 20_000, 1_000_000])
@pytest.mark.parametrize("minutes", [1.0, 3.3])
def test_a_plan_fits_the_time_on_any_machine(rate, minutes):
    plan = demo.fit_into(minutes * 60, rate, 3_400_000)
    assert plan.steps >= 2
    assert 4 <= plan.batch <= 64
    assert 1 <= plan.held_out <= demo.HELD_OUT_SAMPLES
    assert plan.seconds <= minutes * 60
    assert plan.steps * plan.batch * demo.SEQUENCE <= demo.MOST_EPOCHS * 3_400_000
    if rate == 3_700 and minutes == 3.3:
        assert plan.seconds > 0.97 * minutes * 60
        assert 400 <= plan.steps <= 900


def test_the_whole_way_from_text_to_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODEL", "gpt2-tiny")
    monkeypatch.setattr(demo, "SEQUENCE", 64)
    monkeypatch.setattr(demo, "HELD_OUT_SAMPLES", 4)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 12)
    out, corpus = tmp_path / "demo", str(write_corpus(tmp_path / "corpus"))
    page = demo.run(out, corpus=corpus, minutes=0.01)
    said = capsys.readouterr().out

    assert page == out / "run-1" / "report.html"
    assert "<svg" in page.read_text()
    for words in ("tokens/s", "held-out loss fell from", str(page), "Written by the model after"):
        assert words in said.replace("\n", " ") or words in said
    losses = [
        record["loss"] for record in map(json.loads, (out / "run-1/metrics.jsonl").open()) if record["kind"] == "eval"
    ]
    vocabulary = config.load(out / "run-1.toml").config.model.vocabulary
    assert vocabulary is None, "it follows from the tokenizer"
    assert losses[0] == pytest.approx(
        math.log(json.loads((out / "run-1/run.json").read_text())["shape"]["vocabulary"]), rel=0.05
    )
    assert losses[-1] < losses[0]
    assert list((out / "run-1/checkpoints").glob("step-*"))
    assert (out / "run-1/sample.txt").read_text().startswith("Written by the model")

    demo.gather(out / "data", corpus, demo.Console())
    assert "delete it to gather anew" in capsys.readouterr().out
    assert demo.next_run(out) == out / "run-2"


def test_the_config_it_writes_is_read_back_whole(tmp_path):
    path = demo.write_config(tmp_path / 'a "b" run', tmp_path / "data", demo.Plan(40, 32, 8, 5e3), "fp32")
    loaded = config.load(path)
    assert loaded.config.train.micro_batch == 16
    assert loaded.config.train.accumulate == 2
    assert loaded.config.model.layers == 6
    assert tomllib.loads(path.read_text())["run"]["folder"] == str(tmp_path / 'a "b" run')


@pytest.mark.parametrize("minutes", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_is_none_is_refused(tmp_path, minutes):
    with pytest.raises(UserError, match="--minutes"):
        demo.run(tmp_path / "demo", minutes=minutes)


def test_a_corpus_that_is_too_small_is_refused(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "one.txt").write_text("A short text.\n")
    with pytest.raises(UserError, match="too little text"):
        demo.run(tmp_path / "demo", corpus=str(tmp_path / "corpus"))
