"""What the README and the guides tell people to type is typed here, in order, in an empty folder."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tozan.cli import main

ROOT = Path(__file__).parent.parent
GUIDES = ("README.md", "docs/first-hour.md")
PAGES = (*GUIDES, "CONTRIBUTING.md", "docs/design/README.md")
BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """A folder with nothing but the documentation in it; what training changes in this process is put back."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield tmp_path
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


def commands(text):
    return [shlex.split(line, comments=True) for line in text.splitlines() if shlex.split(line, comments=True)]


@pytest.mark.parametrize("guide", GUIDES)
def test_everything_a_guide_says_works(guide, empty_folder, capsys):
    ran = 0
    for block in BLOCK.finditer((ROOT / guide).read_text()):
        if block["file"]:
            Path(block["file"]).parent.mkdir(parents=True, exist_ok=True)
            Path(block["file"]).write_text(block["text"])
        elif block["language"] == "python":
            exec(compile(block["text"], guide, "exec"), {})
            ran += 1
        elif block["language"] == "sh":
            for command in commands(block["text"]):
                if command[0] == "torchrun":
                    launch = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
                    done = subprocess.run(launch, capture_output=True, text=True, timeout=240, check=False)
                    assert done.returncode == 0, done.stderr
                if command[0] == "tozan":
                    assert main(command[1:]) == 0, (command, capsys.readouterr().err)
                    ran += 1
    assert ran >= 8


@pytest.mark.parametrize("page", PAGES)
def test_what_make_and_pytest_are_told_to_do_is_there(page):
    targets = []
    for block in BLOCK.finditer((ROOT / page).read_text()):
        for command in commands(block["text"]) if block["language"] == "sh" else ():
            if command[0] == "make":
                targets += [word for word in command[1:] if "=" not in word]
            elif command[0] == "pytest":
                assert all((ROOT / path).exists() for path in command[1:])
            else:
                assert command[0] in ("tozan", "torchrun", "."), f"nobody checks {command}"
    made = subprocess.run(["make", "-n", "help", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        if not target.startswith("https://"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_ci_script_is_a_script_that_may_be_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "make test" in script.read_text()
