"""From text to a converted model in a few lines of Python, and the same by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tozan
from tozan import cli

TEXT = "The mountain is high. The path is long, and the hut is near the pass.\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on a small data set, both made through the API."""
    root = tmp_path_factory.mktemp("api")
    (root / "texts").mkdir()
    for number in range(40):
        (root / "texts" / f"{number}.txt").write_text(f"Day {number}. {TEXT * (number % 5 + 1)}")
    manifest = tozan.build_data(root / "texts", root / "data", vocabulary=300, validation=0.2, licence="CC0")
    assert manifest.licences.keys() == {"CC0"}
    values = {
        **{"model.preset": "llama-tiny", "model.sequence": 32, "data.path": str(root / "data")},
        **{"run.folder": str(root / "run"), "train.steps": 4, "train.global_batch": 4, "train.threads": 1},
    }
    records: list[dict[str, object]] = []
    result = tozan.train_model(tozan.load_config(None, values), on_record=records.append)
    assert result.step == 4
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2, 3, 4]
    return result.folder


def test_generate(run: Path) -> None:
    options = {"tokens": 12, "temperature": 1.0, "seed": 3}
    text = "".join(tozan.generate(run, "The ", **options))
    assert text == "".join(tozan.generate(run, "The ", **options))
    assert isinstance("".join(tozan.generate(run, "", tokens=5)), str)


def test_evaluate(run: Path) -> None:
    scores = tozan.evaluate(run, samples=4)
    assert scores["perplexity"] == pytest.approx(torch.tensor(scores["loss"]).exp().item(), rel=1e-5)


def test_convert_there_and_back(run: Path, tmp_path: Path) -> None:
    exported = tozan.convert(run, tmp_path / "exported")
    assert json.loads((exported / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    imported = tozan.convert(exported, tmp_path / "imported")
    assert imported.parent == tmp_path / "imported"
    ours, tokenizer, _ = tozan.open_model(run)
    theirs, same_tokenizer, _ = tozan.open_model(tmp_path / "imported")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert tokenizer.sha256 == same_tokenizer.sha256
    with pytest.raises(tozan.UserError, match="not empty"):
        tozan.convert(run, tmp_path / "exported")
    with pytest.raises(tozan.UserError, match="no such folder"):
        tozan.convert(tmp_path / "nowhere", tmp_path / "x")


def test_report(run: Path, tmp_path: Path) -> None:
    assert tozan.write_report(run, tmp_path / "page.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_continuing_with_another_model_is_refused(run: Path) -> None:
    with pytest.raises(tozan.UserError, match=r"model\.layers 2, here 3"):
        tozan.train_model(run / "config.toml", {"model.layers": 3})
    with pytest.raises(TypeError):
        tozan.train_model(tozan.load_config(run / "config.toml"), {"model.layers": 3})


def test_command_line_does_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(run.parent / "data")
    assert cli.main(["data", "inspect", data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocabulary"] == 300
    assert cli.main(["data", "inspect", data]) == 0
    assert "CC0" in capsys.readouterr().out
    assert cli.main(["data", "verify", data]) == 0
    texts, again = str(run.parent / "texts"), str(tmp_path / "again")
    assert cli.main(["data", "build", texts, "--out", again, "--vocabulary", "300", "--validation", "0.2"]) == 0
    assert cli.main(["train", str(run / "config.toml"), "--train.steps", "5"]) == 0
    assert "done: 5 steps" in capsys.readouterr().out
    assert cli.main(["eval", str(run), "--samples", "2", "--json"]) == 0
    assert "loss" in json.loads(capsys.readouterr().out)
    assert cli.main(["generate", str(run), "--prompt", "The", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("The")
    assert cli.main(["convert", str(run), str(tmp_path / "exported")]) == 0
    assert cli.main(["report", str(run)]) == 0


def test_damaged_data_set_ends_with_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "verify", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err
