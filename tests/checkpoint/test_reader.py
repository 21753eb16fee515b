from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tozan.checkpoint import State, load, newest, resolve, save, stream, verify
from tozan.errors import UserError

EMBED = "model/embed.weight"
MODEL = "model-00001-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path, make_state):
    return save(tmp_path / "checkpoints", make_state(100))


def edit_manifest(folder, change, seal):
    """Edit the manifest, with a checksum that fits (a forger's) or the old one (a vandal's)."""
    path = folder / "manifest.json"
    table = json.loads(path.read_text())
    old = table.pop("checksum")
    change(table)
    body = json.dumps(table, indent=1).removesuffix("\n}") + ",\n"
    path.write_text(f'{body} "checksum": "{hashlib.sha256(body.encode()).hexdigest() if seal else old}"\n}}\n')


def swap(folder):
    one, other = folder / MODEL, folder / "optimizer-00001-of-00001.safetensors"
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def tensors_of(table):
    return table["tensors"]


DAMAGES = {
    "truncated tensor file": (lambda f: os.truncate(f / MODEL, (f / MODEL).stat().st_size - 1), MODEL),
    "lengthened tensor file": (lambda f: os.truncate(f / MODEL, (f / MODEL).stat().st_size + 1), MODEL),
    "empty tensor file": (lambda f: os.truncate(f / MODEL, 0), MODEL),
    "swapped files": (swap, MODEL),
    "missing tensor file": (lambda f: (f / MODEL).unlink(), MODEL),
    "missing small file": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "missing trainer.json": (lambda f: (f / "trainer.json").unlink(), "trainer.json"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
    "extra file": (lambda f: (f / "model-00002-of-00002.safetensors").write_bytes(b""), "model-00002"),
    "edited small file": (lambda f: (f / "tokenizer.json").write_bytes(b'{"step": 999}'), "tokenizer.json"),
    "folder in place of a file": (lambda f: ((f / MODEL).unlink(), (f / MODEL).mkdir()), MODEL),
    "pipe in place of a file": (lambda f: ((f / MODEL).unlink(), os.mkfifo(f / MODEL)), MODEL),
    "dangling link in place of a file": (
        lambda f: ((f / MODEL).unlink(), (f / MODEL).symlink_to("nowhere")),
        MODEL,
    ),
    "another writer's file of the same tensors": (
        lambda f: save_file({"embed.weight": torch.zeros(40, 30)}, f / MODEL),
        MODEL,
    ),
    "truncated manifest": (lambda f: os.truncate(f / "manifest.json", 300), "manifest.json"),
    "empty manifest": (lambda f: os.truncate(f / "manifest.json", 0), "manifest.json"),
    "manifest edited": (lambda f: edit_manifest(f, lambda t: t.update(step=101), seal=False), "manifest.json"),
    "manifest of a newer version": (lambda f: edit_manifest(f, lambda t: t.update(version=3), seal=True), "version 3"),
    "manifest of something else": (lambda f: edit_manifest(f, lambda t: t.update(format="?"), seal=True), "format"),
    "manifest with an unknown field": (lambda f: edit_manifest(f, lambda t: t.update(x=1), seal=True), "x: Extra"),
    "forged: path out of the folder": (
        lambda f: edit_manifest(f, lambda t: t["files"].update({"../x": {"bytes": 0, "sha256": "0" * 64}}), seal=True),
        "../x",
    ),
    "forged: absurd shape": (
        lambda f: edit_manifest(
            f,
            lambda t: tensors_of(t)[EMBED].update(
                shape=[1 << 60], parts=[{"file": MODEL, "offset": [0], "shape": [1 << 60], "sha256": "0" * 64}]
            ),
            seal=True,
        ),
        "model/embed.weight",
    ),
    "forged: absurd shape without elements": (
        lambda f: edit_manifest(
            f,
            lambda t: tensors_of(t)[EMBED].update(
                shape=[1 << 62, 1 << 10, 0],
                parts=[{"file": MODEL, "offset": [0, 0, 0], "shape": [1 << 62, 1 << 10, 0], "sha256": "0" * 64}],
            ),
            seal=True,
        ),
        "model/embed.weight",
    ),
    "forged: other shape": (
        lambda f: edit_manifest(
            f,
            lambda t: (
                tensors_of(t)[EMBED].update(shape=[30, 30]),
                tensors_of(t)[EMBED]["parts"][0].update(shape=[30, 30]),
            ),
            seal=True,
        ),
        "model/embed.weight",
    ),
    "forged: parts that do not cover": (
        lambda f: edit_manifest(f, lambda t: tensors_of(t)[EMBED].update(shape=[41, 30]), seal=True),
        "model/embed.weight",
    ),
    "forged: unknown dtype": (
        lambda f: edit_manifest(f, lambda t: tensors_of(t)[EMBED].update(dtype="F3"), seal=True),
        "F3",
    ),
    "forged: tensor in no file": (
        lambda f: edit_manifest(
            f, lambda t: tensors_of(t)[EMBED]["parts"][0].update(file="trainer.json"), seal=True
        ),
        "trainer.json",
    ),
    "forged: no such tensor in the file": (
        lambda f: edit_manifest(f, lambda t: tensors_of(t).update({"model/ghost": tensors_of(t)[EMBED]}), seal=True),
        "model/ghost",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_refused_and_named(folder, damage):
    change, said = DAMAGES[damage]
    assert verify(folder) == []
    change(folder)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)
    problems = verify(folder)
    assert any(said in str(problem) for problem in problems)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found(folder, data):
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    good = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 7))
    bad = bytearray(good)
    bad[at] ^= 1 << bit
    path.write_bytes(bad)
    try:
        with pytest.raises(UserError, match=path.name):
            load(folder)
        assert any(path.name in problem.where for problem in verify(folder))
    finally:
        path.write_bytes(good)


def test_damaged_tensors_are_all_named_with_their_offset(folder):
    path = folder / MODEL
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    data[-1000] ^= 1
    path.write_bytes(data)
    first, second = verify(folder)
    assert "model/embed.weight @ byte" in first.where
    assert "model/norm.weight @ byte" in second.where


def test_a_device_that_fails_while_reading_is_named_and_the_checkpoint_before_is_used(folder, make_state, monkeypatch):
    real, later = os.preadv, save(folder.parent, make_state(101))

    def fail(descriptor, buffers, at):
        if Path(f"/proc/self/fd/{descriptor}").readlink() == later / MODEL:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, at)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UserError, match=f"{MODEL}: cannot read: Input/output error"):
        load(later)
    heard = []
    assert newest(folder.parent, heard.append) == folder
    assert "EIO" in heard[0].what


def test_only_reads_nothing_else(folder, make_state):
    (folder / "optimizer-00001-of-00001.safetensors").unlink()
    state = load(folder, only="model/")
    assert set(state.tensors) == {"model/embed.weight", "model/norm.weight"}
    assert state.meta == make_state(100).meta
    assert verify(folder, only="model/") == []
    assert newest(folder.parent, pytest.fail, only="model/") == folder
    with pytest.raises(UserError, match="optimizer-00001"):
        load(folder)


def test_into_fills_the_given_tensors_whatever_their_strides(folder, make_state):
    wanted = make_state(100).tensors
    into = {
        "model/embed.weight": torch.zeros(30, 40).T,
        "model/norm.weight": torch.nn.Parameter(torch.zeros(30, dtype=torch.bfloat16)),
        "optimizer/step": torch.tensor(0),
    }
    state = load(folder, into=into)
    for name, tensor in into.items():
        assert state.tensors[name] is tensor
        assert torch.equal(tensor, wanted[name])


def test_into_that_does_not_fit_is_refused_before_anything_is_overwritten(folder):
    into = {
        "model/norm.weight": torch.zeros(30, dtype=torch.bfloat16),
        "model/embed.weight": torch.zeros(40, 31),
        "optimizer/step": torch.zeros((), dtype=torch.float32),
        "model/more": torch.zeros(1),
    }
    with pytest.raises(UserError) as caught:
        load(folder, into=into)
    assert len(caught.value.problems) == 3
    assert not into["model/norm.weight"].any()


def test_version_1_is_read_also_in_several_parts(tmp_path):
    """As the version's own page describes it: two ranks' halves, written by the safetensors library."""
    whole = torch.arange(24.0).reshape(4, 6)
    folder = save(tmp_path, State(1, {"model/w": torch.zeros(4, 6)}))
    (folder / MODEL).unlink()
    table = {"dtype": "F32", "shape": [4, 6], "parts": []}
    listed = {}
    for rank, half in enumerate((whole[:, :2].contiguous(), whole[:, 2:].contiguous())):
        path = folder / f"model-{rank + 1:05d}-of-00002.safetensors"
        save_file({"w": half}, path)
        data = path.read_bytes()
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        listed[path.name] = {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "header": {"bytes": len(header), "sha256": hashlib.sha256(header).hexdigest()},
        }
        digest = hashlib.sha256(half.numpy().tobytes()).hexdigest()
        part = {"file": path.name, "offset": [0, 2 * rank], "shape": list(half.shape), "sha256": digest}
        table["parts"].append(part)

    def change(manifest):
        manifest["version"] = 1
        manifest["files"] = {"trainer.json": manifest["files"]["trainer.json"], **listed}
        manifest["tensors"] = {"model/w": table}
        manifest["state"] = None

    edit_manifest(folder, change, seal=True)
    assert verify(folder) == []
    assert torch.equal(load(folder).tensors["model/w"], whole)
    assert torch.equal(dict(stream(folder, into={"model/w": torch.zeros(4, 6)}))["model/w"], whole)


def test_newest_passes_over_damaged_ones_and_says_so(tmp_path, make_state):
    for step in (1, 2, 3, 4):
        save(tmp_path, make_state(step))
    os.truncate(tmp_path / "step-00000004" / MODEL, 9)
    shutil.rmtree(tmp_path / "step-00000003")
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / ".saving-step-00000009.x").mkdir()
    (tmp_path / "step-9").mkdir()
    (tmp_path / "step-00000010").write_text("a file")
    heard = []
    assert newest(tmp_path, heard.append) == tmp_path / "step-00000002"
    assert [problem.where.split("/")[-2] for problem in heard] == ["step-00000004", "step-00000003"]


def test_newest_of_nothing_is_none_but_of_only_damaged_ones_an_error(tmp_path, make_state):
    assert newest(tmp_path / "none", pytest.fail) is None
    assert newest(tmp_path, pytest.fail) is None
    (save(tmp_path, make_state(1)) / MODEL).unlink()
    with pytest.raises(UserError, match="all 1 checkpoints are damaged"):
        newest(tmp_path, lambda _: None)


def test_resolve_takes_a_run_its_checkpoints_or_one_of_them(folder, make_state):
    save(folder.parent, make_state(20))
    for path in (folder, folder.parent, folder.parent.parent):
        assert resolve(path) == folder
    assert resolve(folder.parent / "step-00000020").name == "step-00000020"


def test_resolve_says_what_it_found_instead(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for path, said in (
        (tmp_path, "it holds notes.txt"),
        (tmp_path / "notes.txt", "is a file"),
        (tmp_path / "gone", "does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            resolve(path)
