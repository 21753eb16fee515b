"""What `inspect` tells."""

from pathlib import Path

import pytest

from tozan import data
from tozan.errors import UserError


def test_the_page_has_the_facts(built: Path, documents):
    description = data.inspect(built, documents=2, characters=50)
    manifest = data.Manifest.read(built)
    page = str(description)
    assert f"{manifest.splits['train'].tokens:,}" in page
    assert "CC0-1.0" in page
    assert "made 1" in page
    assert manifest.shards[-1].name in page
    texts = {document.name: document.text for document in documents()}
    assert len(description.excerpts) == 2
    for excerpt in description.excerpts:
        assert excerpt.text == texts[excerpt.name][:50]


def test_damage_is_told(copy: Path):
    (copy / "train-00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="truncated"):
        data.inspect(copy)


def test_no_data_set(tmp_path: Path):
    with pytest.raises(UserError, match="no finished data set"):
        data.inspect(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        data.inspect(tmp_path / "none")
