"""Over a hundred ways to get a config wrong: each is answered with its place, its key, and what to write instead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tozan.config import load
from tozan.errors import UserError

GOOD = """\
version = 1
[run]
folder = "runs/test"
[model]
preset = "gpt2-tiny"
[data]
path = "data"
[train]
steps = 100
"""


@dataclass(frozen=True)
class Bad:
    """One mistake.

    Attributes:
        text: a whole config, or lines to add to GOOD under the table that they begin with.
        flags: flags after it.
        place: where it stands (`:9` for run.toml:9, `--optim.lr`); one of the places, if several are named.
        named: what must be named in what is said.
        fix: a part of the advice.
    """

    name: str
    text: str
    place: str
    named: str
    fix: str
    flags: tuple[str, ...] = ()


def line(added: str) -> str:
    """The good config with `added` under a table of its own; the first added key stands on line 11."""
    return GOOD + added


def key(table: str, assignment: str, named: str, fix: str, name: str | None = None, flags: tuple[str, ...] = ()) -> Bad:
    """A wrong key in a table; those that the good config has already are written inside it."""
    if f"[{table}]" not in GOOD:
        return Bad(name or assignment, line(f"[{table}]\n{assignment}\n"), ":11", named, fix, flags)
    before, header, after = GOOD.partition(f"[{table}]\n")
    written = assignment.partition("=")[0].strip()
    kept = "".join(row + "\n" for row in after.splitlines() if not row.startswith(f"{written} ="))
    place = f":{(before + header).count(chr(10)) + 1}"
    return Bad(name or assignment, f"{before}{header}{assignment}\n{kept}", place, named, fix, flags)


def flag(words: str, named: str, fix: str, place: str | None = None) -> Bad:
    flags = tuple(words.split(" "))
    return Bad(words, GOOD, place or flags[0].partition("=")[0], named, fix, flags)


SYNTAX = [
    Bad("no equals sign", "version = 1\n[train]\nsteps 100\n", ":3:7", "`steps 100`", "`key = value`"),
    Bad("yaml", "version: 1\n", ":1:8", "`version: 1`", "version = 1"),
    Bad("text without quotes", "[data]\npath = data/x\n", ":2:8", "path = data/x", 'path = "data/x"'),
    Bad("quote not closed", '[data]\npath = "data\n', ":2:13", 'path = "data', "ends with the quote"),
    Bad("True", "[train]\ncompile = True\n", ":2:11", "compile = True", "compile = true"),
    Bad("None", "[model]\nkv_heads = None\n", ":2:12", "kv_heads = None", "leave kv_heads out"),
    Bad("no value", "[train]\nsteps =\n", ":2:8", "steps =", "leave steps out"),
    Bad("bare point", "[optim]\nlr = .001\n", ":2:6", "lr = .001", "lr = 0.001"),
    Bad("trailing point", "[optim]\nlr = 1.\n", ":2:7", "lr = 1.", "lr = 1.0"),
    Bad("thousands with commas", "[train]\nsteps = 10,000\n", ":2:11", "steps = 10,000", "steps = 10_000"),
    Bad("leading zeros", "[train]\nsteps = 010\n", ":2:10", "steps = 010", "steps = 10"),
    Bad("header not closed", "[train\nsteps = 1\n", ":1:7", "[train", "[train]"),
    Bad("list not closed", "[metrics]\nprofile = [1, 2\n", ":2:16", "profile = [1, 2", "close the list"),
    Bad("key twice", "[train]\nsteps = 1\nsteps = 2\n", ":3:10", "steps = 2", "once"),
    Bad("table twice", "[train]\nsteps = 1\n[train]\n", ":3:7", "[train]", "once"),
    Bad("a number of 5,000 digits", f"[train]\nsteps = {'9' * 5000}\n", "run.toml", "not valid TOML", "18 digits"),
    Bad("brackets without end", f"x = {'[' * 5000}\n", "run.toml", "nested too deeply", "single level"),
    Bad("empty file", "", "run.toml", "version is missing", "version = 1"),
]

NAMES = [
    key("optim", "betta1 = 0.9", "no key betta1 in [optim]", "`beta1 = 0.9`"),
    key("optim", "learning_rate = 1e-3", "no key learning_rate in [optim]", "`lr = 0.001`"),
    key("optim", "LR = 1e-3", "no key LR in [optim]", "`lr = 0.001`"),
    key("optim", "weight-decay = 0.1", "no key weight-decay", "`weight_decay = 0.1`"),
    key("optim", "zzz = 1", "no key zzz in [optim]", "lr, min_lr, schedule"),
    key("train", "lr = 1e-3", "no key lr in [train]", "`lr = 0.001` under [optim]"),
    key("train", "batch_size = 8", "no key batch_size", "`global_batch = 8`"),
    key("train", "max_steps = 8", "no key max_steps", "`steps = 8`"),
    key("model", "n_layer = 8", "no key n_layer", "`layers = 8`"),
    key("model", "hidden_size = 64", "no key hidden_size", "`width = 64`"),
    key("model", "head = 4", "no key head", "`heads = 4`"),
    Bad("misspelt table", line("[optimm]\nlr = 1e-3\n"), ":10", "no table [optimm]", "[optim]"),
    Bad("unknown table", line("[zzz]\nx = 1\n"), ":10", "no table [zzz]", "[run], [model]"),
    Bad("table as a list", line("[[optim]]\nlr = 1e-3\n"), ":10", "optim", "[optim] with single brackets"),
    Bad("key as a table", line("[optim.lr]\nx = 1\n"), ":10", "optim.lr is a table", "such as lr = 0.0006"),
    Bad("value for a table", "optim = 5\n" + GOOD, ":1", "optim is 5", "[optim] on a line of its own"),
    Bad("key outside tables", "lr = 1e-3\n" + GOOD, ":1", "lr stands outside the tables", "`lr = 0.001` under [optim]"),
    Bad("unknown key outside tables", "zzzz = 1\n" + GOOD, ":1", "no key zzzz", "only `version`"),
    Bad("misspelt version", GOOD.replace("version", "versio"), ":1", "no key versio", "version"),
]

TYPES = [
    key("train", 'steps = "100"', 'train.steps is "100"', "steps = 100"),
    key("train", "steps = 1e3", "train.steps is 1000.0", "steps = 1000"),
    key("train", "steps = 10.5", "train.steps is 10.5", "such as steps = 1000"),
    key("train", "steps = true", "train.steps is true", "such as steps = 1000"),
    key("train", "steps = [1]", "train.steps is [1]", "such as steps = 1000"),
    key("train", "steps = {x = 1}", "train.steps is a table", "such as steps = 1000"),
    key("train", "steps = 2026-01-01", "train.steps is 2026-01-01", "such as steps = 1000"),
    key("train", 'compile = "yes"', 'train.compile is "yes"', "compile = true"),
    key("train", "compile = 1", "train.compile is 1", "compile = true"),
    key("optim", 'lr = "3e-4"', 'optim.lr is "3e-4"', "lr = 0.0003"),
    key("optim", 'lr = "fast"', 'optim.lr is "fast"', "such as lr = 0.0006"),
    key("optim", "warmup = 0.1", "optim.warmup is 0.1", "such as warmup = 0"),
    key("data", "path = 5", "data.path is 5", 'path = "5"'),
    key("data", 'path = ""', 'data.path is ""', "data/mine"),
    key("data", 'path = "a\\u0000b"', "on one line", "data/mine"),
    key("metrics", "profile = 10", "metrics.profile is 10", "profile = [10, 12]"),
    key("metrics", 'profile = ["a", "b"]', "metrics.profile is", "profile = [10, 12]"),
    key("metrics", "profile = [1, 2, 3]", "metrics.profile is [1, 2, 3]", "profile = [10, 12]"),
    key("model", 'kv_heads = "all"', 'model.kv_heads is "all"', "leave kv_heads out"),
]

CHOICES = [
    key("train", 'precision = "bfloat16"', "train.precision", 'precision = "bf16"'),
    key("train", "precision = 16", "train.precision is 16", 'precision = "fp16"'),
    key("train", 'device = "gpu"', 'train.device is "gpu"', 'device = "cuda"'),
    key("train", 'recompute = "all"', 'train.recompute is "all"', '"full"'),
    key("optim", 'schedule = "cosin"', 'optim.schedule is "cosin"', 'schedule = "cosine"'),
    key("model", 'family = "mamba"', 'model.family is "mamba"', '"gpt2"'),
    key("model", 'preset = "gpt2-124"', 'no preset "gpt2-124"', '"gpt2-124m"'),
    key("model", 'preset = "GPT2-TINY"', "no preset", '"gpt2-tiny"'),
    key("model", "preset = 5", "model.preset is 5", "gpt2-tiny"),
    key("data", 'on_bad = "ignore"', 'data.on_bad is "ignore"', 'on_bad = "skip"'),
    Bad("version 2", GOOD.replace("= 1", "= 2", 1), ":1", "version is 2", "version = 1"),
    Bad("version as text", GOOD.replace("= 1", '= "1"', 1), ":1", 'version is "1"', "version = 1"),
    Bad("no version", GOOD.partition("\n")[2], "run.toml", "version is missing", "`version = 1` as the first line"),
    Bad("no steps", GOOD.replace("steps = 100", ""), ":8", "train.steps is missing", "`steps = 1000` under [train]"),
    Bad("no data", GOOD.replace('[data]\npath = "data"', ""), "run.toml", "data.path is missing", "under [data]"),
]

NUMBERS = [
    key("train", "steps = 0", "train.steps is 0", "1 or more"),
    key("train", "steps = -5", "train.steps is -5", "1 or more"),
    key("train", "steps = 99_999_999_999", "1,000,000,000", "1,000,000,000 or less"),
    key("train", "micro_batch = 0", "train.micro_batch is 0", "1 or more, such as 4"),
    key("train", "seed = -1", "train.seed is -1", "0 or more"),
    key("train", f"seed = {2**64}", f"train.seed is {2**64}", "or less"),
    key("train", "threads = -1", "train.threads is -1", "0 or more"),
    key("optim", "lr = 0", "optim.lr is 0", "more than 0, such as 0.0006"),
    key("optim", "lr = -1e-3", "optim.lr is -0.001", "more than 0"),
    key("optim", "lr = nan", "optim.lr is nan", "such as lr = 0.0006"),
    key("optim", "lr = inf", "optim.lr is inf", "10 or less"),
    key("optim", f"lr = 1{'0' * 400}", "optim.lr is a number of more than", "10 or less"),
    key("optim", "beta1 = 1.0", "optim.beta1 is 1.0", "less than 1, such as 0.9"),
    key("optim", "beta2 = -0.1", "optim.beta2 is -0.1", "0 or more"),
    key("optim", "clip = -1", "optim.clip is -1", "0 or more"),
    key("optim", "eps = 0.0", "optim.eps is 0.0", "more than 0"),
    key("model", "dropout = 1.5", "model.dropout is 1.5", "less than 1"),
    key("model", "layers = 0", "model.layers is 0", "1 or more"),
    key("model", "width = 10_000_000_000", "model.width is 10000000000", "1,048,576 or less"),
    key("model", "vocabulary = 1", "model.vocabulary is 1", "2 or more"),
    key("checkpoint", "keep_last = 0", "checkpoint.keep_last is 0", "1 or more"),
    key("metrics", "every = 0", "metrics.every is 0", "1 or more"),
    key("layout", "data = 0", "layout.data is 0", "1 or more"),
]

TOGETHER = [
    key(
        "model", "heads = 5", "model.width 64 is not a multiple of model.heads 5", "width = 60 or 65, or heads = 4 or 8"
    ),
    key("model", "kv_heads = 3", "model.heads 4 is not a multiple of model.kv_heads 3", "kv_heads = 2 or 4"),
    Bad(
        "odd head size",
        GOOD.replace('"gpt2-tiny"', '"llama-tiny"\nwidth = 60\nheads = 4\nkv_heads = 2'),
        ":6",
        "head size 15",
        "width = 56 or 64",
    ),
    Bad(
        "absurd size",
        GOOD.replace('"gpt2-tiny"', '"gpt2-tiny"\nlayers = 10_000\nwidth = 1_048_576'),
        ":6",
        "1.3e+17 parameters",
        "smaller sizes",
    ),
    key(
        "train",
        "compile = true",
        "train.compile with layout.zero 3",
        "zero = 2",
        "compiled ZeRO 3",
        ("--layout.zero=3",),
    ),
    key("optim", "warmup = 100", "optim.warmup 100 must be less than train.steps 100", "warmup = 10"),
    key("optim", "warmup = 2000", "optim.warmup 2000 must be less than train.steps 100", "steps = 20000"),
    key(
        "optim",
        'decay = 90\nwarmup = 20\nschedule = "wsd"',
        "optim.warmup 20 + optim.decay 90 = 110",
        "decay = 80",
        "warm-up and decay overlap",
    ),
    key("optim", "min_lr = 1e-3", "optim.min_lr 0.001 is above optim.lr 0.0006", "min_lr = 6e-05"),
    key("metrics", "profile = [12, 10]", "metrics.profile [12, 10] is not a range", "profile = [10, 12]"),
    key("metrics", "profile = [0, 2]", "metrics.profile [0, 2] is not a range", "profile = [1, 2]"),
    key("metrics", "profile = [10]", "metrics.profile [10] has 1 number", "profile = [10, 12]"),
    key("metrics", "profile = [90, 110]", "ends after train.steps 100", "[98, 100]"),
    key("checkpoint", "keep_every = 100", "checkpoint.every 0 saves only at the end", "every = 100"),
    key(
        "checkpoint", "keep_every = 100\nevery = 30", "not a multiple of checkpoint.every 30", "keep_every = 90 or 120"
    ),
    key(
        "train",
        "global_batch = 256\nmicro_batch = 4\naccumulate = 8",
        "global_batch 256 ≠ micro_batch 4 × accumulate 8 × data 1",
        "global_batch = 32 or accumulate = 64",
        "batch contradiction",
    ),
    key(
        "train",
        "global_batch = 250\nmicro_batch = 4",
        "global_batch 250 ≠ micro_batch 4",
        "global_batch = 248 or 252",
        "batch not whole",
    ),
    key(
        "train",
        "micro_batch = 1_000_000\naccumulate = 1_000_000",
        "1,000,000,000,000",
        "smaller micro_batch",
        "batch absurd",
    ),
]

FLAGS = [
    flag("--train.stps 5", "no key stps in [train]", "--train.steps"),
    flag("--train.micro-batch 5", "no key micro-batch in [train]", "--train.micro_batch"),
    flag("--trian.steps 5", "no key trian.steps", "--train.steps"),
    flag("--lr 5", "no key lr", "--optim.lr"),
    flag("--learning-rate=5", "no key learning-rate", "--optim.lr"),
    flag("--train 5", "train is a table", "--train.steps"),
    flag("--train.steps", "has no value", "--train.steps 1000"),
    flag("--train.steps --optim.lr 1", "has no value", "--train.steps 1000"),
    flag("--train.steps 1e3", "train.steps is 1000.0", "--train.steps 1000"),
    flag("--train.steps=abc", 'train.steps is "abc"', "--train.steps 1000"),
    flag("--train.steps=", 'train.steps is ""', "--train.steps 1000"),
    flag("--train.steps -5", "train.steps is -5", "1 or more"),
    flag("--optim.lr .001", 'optim.lr is ".001"', "--optim.lr 0.001"),
    flag("--train.compile yes", 'train.compile is "yes"', "--train.compile true"),
    flag("--train.precision fp8", 'train.precision is "fp8"', "--train.precision bf16"),
    flag("--metrics.profile 10,12", 'metrics.profile is "10,12"', "--metrics.profile '[10, 12]'"),
    flag("--model.heads 3", "model.width 64 is not a multiple of model.heads 3", "heads = 2 or 4"),
    flag("--model.preset gpt9", 'no preset "gpt9"', "gpt2-124m"),
    flag("steps=5", "a value without a flag", "--table.key", 'argument "steps=5"'),
    flag("--train.steps 5 6", "a value without a flag", "--table.key", 'argument "6"'),
    flag("-train.steps 5", "a value without a flag", "--table.key", 'argument "-train.steps"'),
]

ALL = [*SYNTAX, *NAMES, *TYPES, *CHOICES, *NUMBERS, *TOGETHER, *FLAGS]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_good_config_is_good(folder: Path) -> None:
    Path("run.toml").write_text(GOOD)
    assert load(Path("run.toml")).config.train.steps == 100


def test_the_bar_is_sixty() -> None:
    assert len({bad.name for bad in ALL}) == len(ALL) >= 60


@pytest.mark.parametrize("bad", ALL, ids=lambda bad: bad.name)
def test_bad_config(bad: Bad, folder: Path) -> None:
    Path("run.toml").write_text(bad.text)
    with pytest.raises(UserError) as caught:
        load(Path("run.toml"), bad.flags)
    found = [p for p in caught.value.problems if bad.named in p.what and bad.fix in p.fix]
    assert found, f"wanted {bad.named!r} and {bad.fix!r} in:\n{caught.value}"
    places = [place for problem in found for place in problem.where.split(", ")]
    assert (f"run.toml{bad.place}" if bad.place.startswith(":") else bad.place) in places


def test_all_mistakes_at_once(folder: Path) -> None:
    """Every kind of mistake in one file is said in one go, in the order of the file, flags last."""
    Path("run.toml").write_text(
        'version = 1\n[model]\nwidth = 64\nheads = 5\n[data]\npth = "x"\n[train]\nsteps = "x"\n'
        "global_batch = 5\nmicro_batch = 2\n[optim]\nlr = -1\nmin_lr = -1\n[checkpoint]\nevery = 30\nkeep_every = 100\n"
    )
    with pytest.raises(UserError) as caught:
        load(Path("run.toml"), ["--optim.bta1", "0.9", "--optim.clip", "x"])
    places = [problem.where for problem in caught.value.problems]
    assert places == [
        "run.toml:3, run.toml:4",
        "run.toml:6",
        "run.toml:8",
        "run.toml:9, run.toml:10",
        "run.toml:12",
        "run.toml:13",
        "run.toml:15, run.toml:16",
        "--optim.bta1",
        "--optim.clip",
    ]


SEVERAL = [SYNTAX[0], NAMES[0], TYPES[0], TOGETHER[0], FLAGS[0]]


@pytest.mark.parametrize("bad", SEVERAL, ids=lambda bad: bad.name)
def test_train_refuses_without_traceback(bad: Bad, folder: Path) -> None:
    Path("run.toml").write_text(bad.text)
    command = [sys.executable, "-m", "tozan", "train", "run.toml", *bad.flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert bad.named in done.stderr
    assert bad.fix in done.stderr
    assert not Path("runs").exists()
