from __future__ import annotations

import hashlib
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tozan.checkpoint import State, load, save, state_hash, stream, verify
from tozan.checkpoint.state import DTYPES

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True).flatmap(
    lambda group: st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).map(
        lambda rest: f"{group}/{rest}"
    )
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def tensors(draw):
    """Any dtype, any shape of up to 3 dims (0-d and empty too), random bits (NaN payloads too), maybe transposed."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        flat = torch.randint(0, 2, (count,), generator=generator).bool()
    else:
        size = torch.empty(0, dtype=dtype).element_size()
        flat = torch.randint(0, 256, (count * size,), generator=generator, dtype=torch.uint8).view(dtype)
    tensor = flat.reshape(shape)
    return tensor.T if tensor.ndim == 2 and draw(st.booleans()) else tensor


def bits(tensor):
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=st.dictionaries(NAMES, tensors(), max_size=6), meta=st.dictionaries(st.text(), JSON), data=st.data())
def test_any_state_comes_back_bit_for_bit_and_reads_as_plain_safetensors(table, meta, data, tmp_path_factory):
    table = {name: tensor for name, tensor in table.items() if not name.endswith("/__metadata__")}
    root = tmp_path_factory.mktemp("any")
    folder = save(root, State(3, table, meta), max_file_bytes=data.draw(st.sampled_from([1, 64, 1 << 20])))
    assert verify(folder) == []
    back = load(folder)
    assert back.meta == meta
    theirs = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            theirs |= {f"{path.name.split('-')[0]}/{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for found in (back.tensors, theirs, dict(stream(folder))):
        assert found.keys() == table.keys()
        for name, tensor in table.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert bits(found[name]) == bits(tensor)
    assert json.loads((folder / "manifest.json").read_text())["state"] == state_hash(table) == state_hash(back.tensors)


def test_manifest_binds_every_byte_to_size_and_sha256(tmp_path, make_state):
    folder = save(tmp_path, make_state(7), max_file_bytes=3000)
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = manifest["files"]
    assert {path.name for path in folder.iterdir()} - {"manifest.json"} == listed.keys()
    assert sum(name.startswith("model-") for name in listed) == 2
    for name, facts in listed.items():
        data = (folder / name).read_bytes()
        assert facts["bytes"] == len(data)
        if facts["header"] is None:
            assert facts["sha256"] == hashlib.sha256(data).hexdigest()
            continue
        size = facts["header"]["bytes"]
        assert facts["header"]["sha256"] == hashlib.sha256(data[:size]).hexdigest()
        parts = {
            tensor.partition("/")[2]: part["sha256"]
            for tensor, entry in manifest["tensors"].items()
            for part in entry["parts"]
            if part["file"] == name
        }
        places = {key: at["data_offsets"] for key, at in json.loads(data[8:size]).items() if key != "__metadata__"}
        assert parts == {key: hashlib.sha256(data[size + a : size + b]).hexdigest() for key, (a, b) in places.items()}
        assert sum(b - a for a, b in places.values()) == len(data) - size


def test_same_state_makes_the_same_bytes_whatever_the_order_of_the_mapping(tmp_path, make_state):
    state = make_state(7)
    turned = State(7, dict(reversed(state.tensors.items())), state.meta, state.files)
    one, other = save(tmp_path / "one", state), save(tmp_path / "other", turned)
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


def test_state_hash_sees_names_dtypes_shapes_and_bytes():
    base = torch.arange(6.0).reshape(2, 3)
    hashes = [
        state_hash(tensors)
        for tensors in (
            {"model/a": base},
            {"model/b": base},
            {"model/a": base.reshape(3, 2)},
            {"model/a": base.view(torch.int32)},
            {"model/a": base + torch.tensor([[0.0, 0, 0], [0, 0, 1e-6]])},
            {"model/a": base, "model/b": torch.empty(0)},
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert state_hash({"model/a": base.T.contiguous().T}) == hashes[0]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"step": -1}, ValueError, "step -1"),
        ({"step": True}, ValueError, "step True"),
        ({"tensors": {"weight": torch.ones(1)}}, ValueError, "group/rest"),
        ({"tensors": {"../x/weight": torch.ones(1)}}, ValueError, "group/rest"),
        ({"tensors": {"model/__metadata__": torch.ones(1)}}, ValueError, "__metadata__"),
        ({"tensors": {"model/\ud800": torch.ones(1)}}, ValueError, "surrogates"),
        ({"tensors": {"model/w": torch.ones(1, dtype=torch.complex128)}}, TypeError, "model/w"),
        ({"tensors": {"model/w": torch.ones(1, device="meta")}}, TypeError, "meta"),
        ({"tensors": {"model/w": torch.ones(1).to_sparse()}}, TypeError, "sparse"),
        ({"files": {"../x": b""}}, ValueError, "plain"),
        ({"files": {"manifest.json": b""}}, ValueError, "plain"),
        ({"files": {"x.safetensors": b""}}, ValueError, "plain"),
        ({"meta": {"loss": float("nan")}}, ValueError, "NaN"),
        ({"meta": {1: 2}}, ValueError, "strings as keys"),
        ({"meta": {"a": (1, 2)}}, ValueError, "tuples"),
        ({"meta": {"a": object()}}, TypeError, "object"),
    ],
)
def test_what_could_not_come_back_is_refused_before_anything_is_written(tmp_path, change, error, said):
    with pytest.raises(error, match=said):
        save(tmp_path / "root", State(**{"step": 1, "tensors": {}, **change}))
    assert not (tmp_path / "root").exists()


def test_saving_over_a_step_replaces_it_whole(tmp_path, make_state, equal):
    save(tmp_path, State(2, {"model/old": torch.ones(3)}))
    folder = save(tmp_path, make_state(2))
    assert equal(load(folder), make_state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
