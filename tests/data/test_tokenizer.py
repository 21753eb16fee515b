"""The tokenizer: lossless, deterministic, and never fooled by text that looks like its end token."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from tozan.data import Tokenizer
from tozan.data import tokenizer as module
from tozan.errors import UserError


@pytest.fixture(scope="module")
def texts(documents) -> list[str]:
    return [document.text for document in documents(60)]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Tokenizer:
    return Tokenizer.train(texts, 400)


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_survives(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.size for token in ids)


@pytest.mark.parametrize(
    "text", ["", "<|end|>", "a<|end|>b", "\x00\x7f\u0085\u2028", "日本語\r\n\t 👩‍👩‍👧", " \n" * 50, "a" * 3000]
)
def test_awkward_text_survives(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.end not in tokenizer.encode(text)


def test_end_is_a_token_of_its_own(tokenizer: Tokenizer):
    assert tokenizer.decode([tokenizer.end]) == "<|end|>"
    assert tokenizer.end < tokenizer.size <= 400


def test_long_texts_are_cut_without_loss(tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PIECE", 50)
    text = "".join(texts[:3]) + "\n" * 120 + "x" * 333
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_are_the_librarys(tokenizer: Tokenizer, texts: list[str]):
    library = Library.from_str(tokenizer.json.decode())
    for text in texts[:10]:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_training_gives_the_same_bytes_in_another_process_with_other_threads(
    tokenizer: Tokenizer, texts: list[str], tmp_path: Path
):
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import json, sys; from pathlib import Path; from tozan.data import Tokenizer;"
        "print(Tokenizer.train(json.loads(Path(sys.argv[1]).read_text()), 400).sha256)"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", code, str(tmp_path / "texts.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tokenizer.sha256


@pytest.mark.parametrize("vocabulary", [-1, 0, 256])
def test_vocabularies_without_room_for_all_bytes_are_refused(texts: list[str], vocabulary: int):
    with pytest.raises(UserError, match="257"):
        Tokenizer.train(texts, vocabulary)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[1, 2]", b'{"model": 3}'])
def test_files_that_are_no_tokenizer_are_refused(content: bytes):
    with pytest.raises(UserError, match="no tokenizer"):
        Tokenizer.load(content)


def test_tokenizers_without_an_end_are_refused():
    from tokenizers import models

    with pytest.raises(UserError, match="end"):
        Tokenizer.load(Library(models.BPE()).to_str().encode())
