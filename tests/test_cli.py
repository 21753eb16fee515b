"""The command line: what each verb calls, how mistakes end, and that nothing heavy is loaded early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import click
import pytest

import tozan
from tozan import api, cli
from tozan.errors import Problem, UserError

ROOT = Path(__file__).parents[1]
GOOD = 'version = 1\n[model]\npreset = "gpt2-tiny"\n[data]\npath = "data"\n[train]\nsteps = 100\n'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and a data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "run.toml").write_text(GOOD)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"format": "tozan-data"}')
    return tmp_path


def loaded_by(*words: str) -> set[str]:
    """The modules that a fresh `tozan WORDS` has imported when it ends."""
    program = "import sys; from tozan.cli import main; main(sys.argv[1:]); print('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "numpy", "pydantic", "rich", "tokenizers", "pyarrow", "safetensors", "matplotlib", "jinja2"}


def test_help_loads_nothing_heavy() -> None:
    modules = loaded_by("--help")
    assert not modules & HEAVY
    assert {name for name in modules if name.startswith("tozan")} == {
        *(
            "tozan",
            "tozan.cli",
            "tozan.cli_bench",
            "tozan.cli_chaos",
            "tozan.cli_plan",
            "tozan.cli_report",
            "tozan.cli_words",
            "tozan.errors",
        )
    }


def test_refused_config_never_loads_torch() -> None:
    modules = loaded_by("train", "run.toml", "--train.stepz", "5")
    assert "pydantic" in modules
    assert not modules & (HEAVY - {"pydantic"})


def test_missing_data_is_seen_before_torch() -> None:
    assert "torch" not in loaded_by("train", "run.toml", "--data.path", "nowhere")


def verbs(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(command, click.Group):
        return [path] + [verb for name, inner in command.commands.items() for verb in verbs(inner, (*path, name))]
    return [path]


@pytest.mark.parametrize("path", verbs(cli.cli), ids=" ".join)
def test_every_verb_explains_itself(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*path, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: {' '.join(('tozan', *path))}")
    if path not in {("data",), ("config",)}:
        assert "Examples:\n    tozan" in text


def examples() -> list[list[str]]:
    """Every command in the help texts that names only files of the repository."""
    found = []
    for path in verbs(cli.cli):
        command: click.Command = cli.cli
        for name in path:
            assert isinstance(command, click.Group)
            command = command.commands[name]
        found += [line.split() for line in (command.epilog or "").splitlines() if "configs/" in line]
    return found


def test_help_names_files_that_exist() -> None:
    named = [word for words in examples() for word in words if word.startswith("configs/")]
    assert named
    assert all((ROOT / word).is_file() for word in named)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tozan {tozan.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "'train'"),
        (["train"], "CONFIG"),
        (["train", "--optim.lr", "1"], "the file comes first"),
        (["data", "build", "x"], "--out"),
        (["data", "biuld"], "build"),
        (["eval", "runs/x", "--precision", "int8"], "int8"),
        (["generate", "runs/x", "--tokens", "0"], "--tokens"),
        (["config", "show"], "--presets"),
    ],
)
def test_wrong_words_end_with_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err


def test_problems_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "check", "run.toml", "--train.stepz", "5", "--optim.lr", "x"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "--train.stepz: there is no key stepz in [train]\n    → did you mean --train.steps?" in printed.err
    assert printed.err.endswith("2 problems\n")


def raising(error: BaseException) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (UserError(Problem("here", "wrong")), 2)],
)
def test_how_errors_end(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_report", raising(error))
    assert cli.main(["report", "runs/x"]) == code


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_report", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "runs/x"])


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m tozan config schema | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_config_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "run.toml", "--optim.lr", "1e-2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train.steps", "100", "run.toml:7"] in rows
    assert ["optim.lr", "0.01", "--optim.lr"] in rows
    assert ["model.layers", "2", "preset", "gpt2-tiny"] in rows
    assert ["optim.beta1", "0.9", "default"] in rows


def test_config_show_toml_is_a_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "run.toml", "--toml"]) == 0
    (here / "complete.toml").write_text(capsys.readouterr().out)
    assert tozan.load_config("complete.toml").config == tozan.load_config("run.toml").config


def test_config_show_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "--presets"]) == 0
    assert "gpt2-124m   124,475,904" in capsys.readouterr().out


def test_config_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "check", "run.toml", "--data.path", "nowhere"]) == 0
    assert "gpt2-tiny" in capsys.readouterr().out
    assert cli.main(["config", "check", "run.toml", "--data.path", "nowhere", "--here"]) == 2


def test_config_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["train"]["required"] == ["steps"]
    assert cli.main(["config", "schema", "--page"]) == 0
    assert capsys.readouterr().out.startswith("# The config")


@pytest.mark.parametrize(
    ("words", "function", "arguments", "options"),
    [
        (["report", "runs/x"], "write_report", (Path("runs/x"), None, None), {}),
        (["convert", "a", "b"], "convert", (Path("a"), Path("b")), {}),
        (
            ["data", "build", "x", "y", "--out", "d", "--vocabulary", "300", "--limit-megabytes", "2"],
            "build_data",
            (("x", "y"), Path("d")),
            {"vocabulary": 300, "limit": 2_000_000, "shard_bytes": 64 << 20, "seed": 0, "overwrite": False},
        ),
    ],
)
def test_verbs_call_the_api(
    words: list[str],
    function: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(api, function, lambda *args, **kwargs: calls.append((args, kwargs)))
    assert cli.main(words) == 0
    [(args, kwargs)] = calls
    assert args == arguments
    assert options.items() <= kwargs.items()


def test_eval_prints_scores(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(api, "evaluate", lambda *_, **__: {"loss": 2.5, "bits_per_byte": 1.0, "tokens": 12345})
    assert cli.main(["eval", "runs/x"]) == 0
    assert capsys.readouterr().out == "loss            2.5000\nbits per byte   1.0000\ntokens          12,345\n"
    assert cli.main(["eval", "runs/x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"loss": 2.5, "bits_per_byte": 1.0, "tokens": 12345}


def test_generate_prints_prompt_and_pieces(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(api, "generate", lambda *_, **__: iter(["the ", "end"]))
    assert cli.main(["generate", "runs/x", "--prompt", "This is "]) == 0
    assert capsys.readouterr().out == "This is the end\n"


def test_train_passes_flags_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    class Interrupted(Exception):
        signal = 15

    def train(loaded: Any, on_record: Any) -> Any:
        seen.append(loaded)
        if loaded.config.train.steps == 1:
            raise Interrupted("stopped by SIGTERM after step 0")
        return types.SimpleNamespace(step=5, folder=Path("runs/x"))

    trainer = types.ModuleType("tozan.train")
    trainer.train, trainer.Interrupted = train, Interrupted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tozan.train", trainer)
    monkeypatch.setattr(tozan, "train", trainer, raising=False)
    assert cli.main(["train", "run.toml", "--optim.lr", "-0.1"]) == 2
    assert not seen
    capsys.readouterr()
    assert cli.main(["train", "run.toml", "--train.steps=5", "--optim.lr", "1e-2", "--run.folder", "runs/x"]) == 0
    assert (seen[0].config.train.steps, seen[0].config.optim.lr) == (5, 1e-2)
    printed = capsys.readouterr().out
    assert printed.startswith("run folder: runs/x\n")
    assert "done: 5 steps in runs/x" in printed
    assert cli.main(["train", "run.toml", "--train.steps=1"]) == 75
    assert "stopped by SIGTERM" in capsys.readouterr().err


def test_launch_writes_the_script_of_the_layout(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "run.toml", "--layout.data=4", "--launcher", "torchrun", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "--nproc-per-node=4" in script or "--nproc-per-node 4" in script
    assert f"{here / 'run.toml'} --layout.data=4" in script
    words = ["launch", "run.toml", "--layout.data=4", "--launcher", "pjm", "--nodes", "4", "--shape", "2x2"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert '#PJM -L "node=2x2' in capsys.readouterr().out
    assert cli.main([*words[:-1], "2xtwo"]) == 2
    assert "2x3x2" in capsys.readouterr().err


def test_launch_starts_one_agent_for_each_node(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "run.toml", "--layout.data=8", "--launcher", "slurm", "--nodes", "2", "--agent", "--dry-run"]
    assert cli.main(words) == 0
    script = capsys.readouterr().out
    assert "srun --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 --no-kill" in script
    assert f"tozan agent {here / 'run.toml'} --layout.data=8" in script


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = types.ModuleType("tozan.train")
    trainer.train = lambda *_: types.SimpleNamespace(step=5, folder=Path("x"))  # type: ignore[attr-defined]
    trainer.Interrupted = RuntimeError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tozan.train", trainer)
    monkeypatch.setattr(tozan, "train", trainer, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "run.toml", "--layout.data", "2"]) == 0
    assert capsys.readouterr().out == ""


def test_installed_command_is_main() -> None:
    environment = dict(os.environ, COLUMNS="80")
    done = subprocess.run(
        [sys.executable, "-m", "tozan", "train", "nowhere.toml"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("nowhere.toml: there is no such file")


def test_lists_of_verbs_say_whole_sentences():
    def verbs(group):
        for verb in group.commands.values():
            yield verb
            yield from verbs(verb) if isinstance(verb, click.Group) else ()

    listed = [verb.get_short_help_str(60) for verb in verbs(cli.cli)]
    assert len(listed) > 25
    assert [text for text in listed if text.endswith("...") or not text.endswith(".")] == []
