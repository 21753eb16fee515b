"""`tozan plan`: its verbs, and that it starts without torch."""

import subprocess
import sys

from tozan.cli import main
from tozan.config import load


def test_plan_writes_what_it_says(tmp_path, capsys):
    page, out = tmp_path / "plan.html", tmp_path / "plan"
    words = ["plan", "gpt2-124m", "--machine", "xeon-amx", "--nodes", "2", "--tokens", "1e9"]
    assert main([*words, "--html", str(page), "--out", str(out)]) == 0
    assert "Best layouts" in capsys.readouterr().out
    assert main(["report", str(out), "--out", str(tmp_path / "same.html")]) == 0
    assert page.read_text() == (tmp_path / "same.html").read_text(), "tozan report draws the same page of plan.json"
    assert load(out / "plan.toml").config.train.steps > 0
    assert (out / "launch.sh").read_text().startswith("#!/bin/bash")


def test_talk_and_mistakes(capsys):
    assert main(["plan", "talk", "trends"]) == 0
    assert "Moore" in capsys.readouterr().out
    assert main(["plan", "gpt2-124m", "--machine", "abacus"]) == 2
    assert "no machine and no file is called 'abacus'" in capsys.readouterr().err
    assert main(["plan", "gpt2-124m"]) == 2
    assert "one of a100-40" in capsys.readouterr().err


def test_plan_starts_without_torch():
    code = "import sys; from tozan.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    words = ["plan", "gpt2-124m", "--machine", "xeon-amx", "--nodes", "1", "--tokens", "1e9"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False)
    assert done.returncode == 0
