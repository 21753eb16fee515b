"""Flipped bits in weights, optimizer state and gradients, alone and in layouts: found, named, and undone."""

import json
import random
from pathlib import Path

import pytest
import torch
from ranks import spawn

from tozan import checkpoint
from tozan.comm import Mesh
from tozan.config import load
from tozan.ops import checksums
from tozan.train import SilentError, fit, train
from tozan.train.clock import Clock
from tozan.train.integrity import Watch, combine, held
from tozan.train.run import assemble
from tozan.train.split import mesh_layout
from tozan.train.step import train_step

CONFIG = """
version = 1
[run]
folder = "{folder}"
[model]
layers = 2
width = 32
heads = 4
mlp_width = 64
vocabulary = 384
sequence = 16
[data]
path = "{data}"
[train]
steps = 4
global_batch = 4
precision = "fp32"
threads = 1
[optim]
lr = 1e-2
warmup = 1
"""
LAYOUTS = {
    "dp2": ["--layout.data=2"],
    "dp3": ["--layout.data=3", "--train.global_batch=6"],
    "dp2-zero1": ["--layout.data=2", "--layout.zero=1"],
    "dp2-zero3": ["--layout.data=2", "--layout.zero=3"],
    "dp4-zero3-by2": ["--layout.data=4", "--layout.zero=3", "--layout.zero_group=2", "--train.global_batch=8"],
    "tp2-seq": ["--layout.tensor=2", "--layout.sequence_parallel=true"],
    "tp4-2d": ["--layout.tensor=4", "--layout.scheme=2d", "--train.global_batch=2", "--model.layers=1"],
    "pp2": ["--layout.pipeline=2"],
    "dp2-tp2-zero1": ["--layout.data=2", "--layout.tensor=2", "--layout.zero=1"],
}


def write(folder: Path, data: Path) -> Path:
    path = folder.with_name(folder.name + ".toml")
    path.write_text(CONFIG.format(folder=folder, data=data))
    return path


def flip(tensor: torch.Tensor, index: int, bit: int) -> None:
    """Flip one bit of one fp32 element; twice is the identity."""
    flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach()
    flat.view(torch.int32)[index] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)


def open_run(path: Path, flags: list[str], steps: int = 10_000):
    loaded = load(path, [*flags, f"--train.steps={steps}", "--train.micro_batch=2", "--eval.every=0"])
    return assemble(loaded, Mesh.create(mesh_layout(loaded.config), timeout_s=60))


def step(run) -> None:
    while train_step(run, Clock()).again:
        pass
    run.step += 1
    run.samples += run.global_batch


def take(run, steps: int) -> None:
    for _ in range(steps):
        step(run)


def flips_at_rest(path: Path, flags: list[str], flips: int, seed: int = 1) -> tuple[int, int, list[str]]:
    """Train, and before each step flip a random bit of a random tensor of a random rank.

    Returns:
        (flips, those found at the very next update with the right rank and tensor, what was said)
    """
    run, chance = open_run(path, flags), random.Random(seed)
    world, rank = run.split.mesh.world_size, run.split.mesh.rank
    pieces, found, said = held(run.split, run.optimizer), 0, []
    step(run)
    for _ in range(flips):
        guilty, where, place, bit = (
            chance.randrange(world),
            chance.random(),
            chance.random(),
            chance.choice([*range(12, 32), chance.randrange(12)]),
        )
        piece = pieces[int(where * len(pieces))]
        index = int(place * piece.tensor.numel())
        if rank == guilty:
            flip(piece.tensor, index, bit)
        try:
            train_step(run, Clock())
        except SilentError as error:
            said.append(str(error))
            named = rank != guilty or piece.name in error.what
            found += error.ranks == (guilty,) and named and "host" in error.what
        if rank == guilty:
            flip(piece.tensor, index, bit)
        run.optimizer.zero_grad()
        if chance.random() < 0.1:
            step(run)  # all is well again: no alarm
    return flips, found, said


@pytest.fixture
def config(text_data, tmp_path) -> Path:
    return write(tmp_path / "run", text_data)


def test_every_flipped_bit_at_rest_is_found_at_the_next_update(config):
    flips, found, said = flips_at_rest(config, [], 200)
    assert found == flips, said[:3]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_flipped_bit_is_found_on_every_rank_that_names_the_guilty_one(name, config):
    flags = LAYOUTS[name]
    results = spawn(_processes(flags), flips_at_rest, config, flags, 25)
    for flips, found, said in results:
        assert found == flips, said[:3]
        assert said == results[0][2]


def _processes(flags: list[str]) -> int:
    sizes = dict(flag.removeprefix("--layout.").split("=") for flag in flags if flag.startswith("--layout."))
    return int(sizes.get("data", 1)) * int(sizes.get("tensor", 1)) * int(sizes.get("pipeline", 1))


def differing_copies(path: Path, flags: list[str], guilty: int, name: str) -> tuple[list[int], str]:
    """One rank ends an update with other bits than its copies, as after an error of its arithmetic."""
    run = open_run(path, flags)
    step(run)
    if run.split.mesh.rank == guilty:
        flip(dict(run.split.sync.resting)[name], 3, 9)
        run.checks.keep(run.step)
    with pytest.raises(SilentError) as caught:
        step(run)
    return list(caught.value.ranks), caught.value.what


@pytest.mark.parametrize(
    ("flags", "name", "suspects"),
    [
        (["--layout.data=3", "--train.global_batch=6"], "blocks.0.attn.qkv.weight", [1]),
        (["--layout.data=2"], "blocks.0.attn.qkv.weight", [0, 1]),
        (["--layout.tensor=2"], "blocks.0.norm1.weight", [0, 1]),
        (["--layout.pipeline=2"], "embed.weight", [0, 1]),
    ],
)
def test_copies_that_differ_are_found_and_a_majority_names_the_rank(flags, name, suspects, config):
    for ranks, what in spawn(_processes(flags), differing_copies, config, flags, 1, name):
        assert ranks == suspects
        assert f"model/{name} differs from its copies" in what


def rotating(path: Path, flags: list[str]) -> list[int]:
    """Steps until a lasting difference between copies is found when a tenth is watched at a time."""
    run = open_run(path, [*flags, "--checks.memory=rotating"])
    step(run)
    delays = []
    for number, parameter in enumerate(run.split.sync.resting.values()):
        if run.split.mesh.rank == 1:
            flip(parameter, 1, 28 - number % 8)
        before = run.step
        with pytest.raises(SilentError):
            take(run, 12)
        delays.append(run.step - before + 1)
        run.optimizer.zero_grad()
        for name, tensor in run.split.sync.parameters.items():  # make them copies again
            torch.distributed.broadcast(tensor.detach(), 0)
            for slot in ("exp_avg", "exp_avg_sq"):
                torch.distributed.broadcast(run.optimizer.tensors()[f"{slot}/{name}"], 0)
        run.checks.forget()
    return delays


def test_a_rotating_watch_sees_what_lasts_within_ten_steps(config):
    for delays in spawn(2, rotating, config, ["--layout.data=2"]):
        assert max(delays) <= 11
        assert sum(delay <= 10 for delay in delays) >= 0.95 * len(delays)


def gradient_flips(path: Path, flags: list[str], flips: int, bits: tuple[int, ...]) -> tuple[int, int, int, list]:
    """Flip a bit of a gradient in one backward pass of one rank.

    Returns:
        (flips, those found, those found that named the rank, gradient norms of the steps that were accepted)
    """
    run, chance = open_run(path, [*flags, "--optim.lr=1e-4"]), random.Random(3)
    parameters = dict(run.split.model.named_parameters())
    found = named = 0
    norms = []
    take(run, 20)
    for _ in range(flips):
        guilty = chance.randrange(run.split.mesh.world_size)
        parameter = parameters[chance.choice(sorted(parameters))]
        place, bit, armed = chance.randrange(parameter.numel()), chance.choice(bits), [run.split.mesh.rank == guilty]

        def hurt(gradient, place=place, bit=bit, armed=armed):
            if armed.pop() if armed else False:
                gradient = gradient.clone()
                flip(gradient, place, bit)
            return gradient

        hook = parameter.register_hook(hurt)
        tries, result = 1, train_step(run, Clock())
        while result.again:
            tries, result = tries + 1, train_step(run, Clock())
        hook.remove()
        norms.append(result.grad_norm)
        said = " ".join(text for _, text in run.checks.take_events())
        found += "differently" in said
        named += f"error of computing on rank {guilty}" in said
        run.step += 1
        run.samples += run.global_batch
    return flips, found, named, norms


@pytest.mark.parametrize("flags", [[], ["--layout.data=2"], ["--layout.data=2", "--layout.zero=2"]])
def test_repeated_steps_find_every_flip_in_a_gradient_and_name_the_rank(flags, config):
    arguments = config, [*flags, "--checks.recompute=1"], 25, tuple(range(10, 32))
    for flips, found, named, _ in [gradient_flips(*arguments)] if not flags else spawn(2, gradient_flips, *arguments):
        assert found == named == flips


@pytest.mark.parametrize("flags", [[], ["--layout.data=2", "--layout.zero=2"]])
def test_an_explosion_in_a_gradient_is_undone_by_computing_the_step_again(flags, config):
    """The exponent's top bit makes a small gradient huge, infinite or NaN; the step then taken is the clean one."""
    run = gradient_flips if not flags else lambda *arguments: spawn(2, gradient_flips, *arguments)[0]
    flips, found, _, norms = run(config, flags, 25, (30,))
    assert found == flips
    assert norms == pytest.approx(run(config, flags, 25, (0,))[3], rel=1e-4)


def test_a_spike_that_the_data_makes_is_kept(config):
    """A loss that is as high when computed again is no error: one event, the step counts."""
    run = open_run(config, ["--checks.outlier=6"])
    take(run, 20)
    plain = run.data.samples
    generator = torch.Generator().manual_seed(2)
    run.data.samples = lambda number, count: torch.randint(
        0, 384, plain(number, count).shape, generator=generator.manual_seed(2)
    ).numpy()
    result = train_step(run, Clock())
    assert "above the last" in result.again
    assert train_step(run, Clock()).again is None
    assert [event for event, _ in run.checks.take_events()] == ["odd step"]


def with_flips(path: Path, flags: list[str], at: dict[int, int]) -> None:
    """A run in which after each of some steps a bit of a weight of some rank flips, once."""
    loaded = load(path, flags)
    run = assemble(loaded, Mesh.create(mesh_layout(loaded.config), timeout_s=60))
    keep, left = run.checks.keep, dict(at)

    def hurt(step, written):
        keep(step, written)
        if left.get(step) is not None and left.pop(step) == run.split.mesh.rank:
            flip(next(iter(run.split.sync.parameters.values())), 5, 30)

    run.checks.keep = hurt
    fit(run)


def events(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == "event"]


@pytest.mark.parametrize("flags", [[], ["--layout.data=2", "--layout.zero=1"]])
def test_a_run_with_flipped_bits_ends_with_the_weights_of_a_peaceful_one(flags, text_data, tmp_path):
    flags = [*flags, "--train.micro_batch=2", "--train.steps=12", "--checkpoint.every=2"]
    peace, war = write(tmp_path / "peace", text_data), write(tmp_path / "war", text_data)
    if "--layout.data=2" in flags:
        spawn(2, with_flips, peace, flags, {})
        spawn(2, with_flips, war, flags, {3: 1, 4: 0, 9: 1})
    else:
        train(load(peace, flags))
        with_flips(war, flags, {3: 0, 4: 0, 9: 0})
    hashes = [
        checkpoint.state_hash(checkpoint.load(checkpoint.resolve(tmp_path / name)).tensors) for name in ("peace", "war")
    ]
    assert hashes[0] == hashes[1]
    found = [event["event"] for event in events(tmp_path / "war")]
    assert found.count("silent error") == found.count("resumed") == 3
    assert "silent error" not in [event["event"] for event in events(tmp_path / "peace")]


def test_without_a_checkpoint_or_by_config_the_run_ends_with_the_message(text_data, tmp_path):
    for name, flags in {"none": [], "stop": ["--checks.on_error=stop", "--checkpoint.every=1"]}.items():
        path = write(tmp_path / name, text_data)
        with pytest.raises(SilentError, match=r"rank 0 at step 2: model/.* changed in memory"):
            with_flips(path, ["--train.micro_batch=2", *flags], {2: 0})


def test_a_machine_that_keeps_making_errors_is_left(text_data, tmp_path):
    path = write(tmp_path / "run", text_data)
    run = assemble(load(path, ["--train.micro_batch=2", "--checkpoint.every=2"]))
    keep = run.checks.keep

    def hurt(step, written):
        keep(step, written)
        if step == 3:
            flip(next(iter(run.split.sync.parameters.values())), 5, 30)

    run.checks.keep = hurt
    with pytest.raises(SilentError):
        fit(run)
    assert [event["event"] for event in events(tmp_path / "run")].count("resumed") == 5


def test_combined_words_tell_places_apart():
    assert combine([5, 7], [0, 1]) != combine([7, 5], [0, 1])
    assert combine([], []) != 0


def test_a_watch_in_turns_covers_everything_once(config):
    run = open_run(config, [])
    pieces = held(run.split, run.optimizer)
    watch, seen = Watch(pieces, 10), []
    for number in range(10):
        watch.keep(number)
        seen += watch._watched
    assert sorted(seen) == list(range(len(pieces)))


@pytest.mark.parametrize("flags", [[], ["--layout.data=2"], ["--layout.data=2", "--layout.zero=1"]])
def test_what_the_optimizer_sums_is_what_memory_holds(config, flags):
    """And all of the state is summed so, but for weights that ZeRO 1 gathers afterwards."""
    for wrong, unknown in spawn(_processes(flags), sums_of_a_step, config, flags):
        assert not wrong
        assert all(name.startswith("buffer/") or "--layout.zero=1" in flags for name in unknown)


def sums_of_a_step(path: Path, flags: list[str]) -> tuple[list[str], list[str]]:
    """Names of what the optimizer summed wrongly in a step, and of what it did not sum."""
    run = open_run(path, flags)
    pieces, known = held(run.split, run.optimizer), {}
    update = run.optimizer.step
    run.optimizer.step = lambda *given: known.update(update(*given)) or known
    step(run)
    wrong = [p.name for p in pieces if p.written in known and checksums([p.tensor]) != [known[p.written]]]
    return wrong, [p.name for p in pieces if p.written not in known]
