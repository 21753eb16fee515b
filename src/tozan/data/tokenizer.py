"""Text to tokens and back: byte-level BPE, by the `tokenizers` library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from tozan import files
from tozan.errors import Problem, UserError

END = "<|end|>"
ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>")
"""Names of the token between documents: ours, then those of tokenizers made elsewhere."""
SMALLEST = 257
"""All bytes and the end token."""
PIECE = 1 << 18
"""Characters handed to the library at once; longer texts are cut at a line's end, which bounds its memory."""


class Tokenizer:
    """A byte-level BPE vocabulary. Any Unicode text survives encoding and decoding unchanged.

    Attributes:
        end: id of the token between documents.
        size: ids run from 0 to size - 1.
        json: the tokenizer as a `tokenizer.json`, the format of the `tokenizers` library.
    """

    def __init__(self, library: Library, json: bytes, where: str) -> None:
        """Wraps a loaded library tokenizer; use `train` or `load`."""
        end = next((i for i in map(library.token_to_id, ENDS) if i is not None), None)
        if end is None:
            rule = f"the vocabulary has none of the tokens {', '.join(ENDS)} that may stand between documents"
            raise UserError(Problem(where, rule, f"add a special token {END} to it"))
        # Text that happens to contain the characters "<|end|>" stays text: it must never end a document.
        library.encode_special_tokens = True
        self._library = library
        self.json = json
        self.end: int = end
        self.size: int = max(library.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> Tokenizer:
        """Learns a vocabulary; the same texts in the same order give the same bytes, whatever the number of threads.

        Args:
            texts: what to learn from.
            vocabulary: largest size; a small corpus may give fewer tokens.

        Raises:
            UserError: the vocabulary has no room for all bytes and the end token.
        """
        if vocabulary < SMALLEST:
            rule = f"{vocabulary} is too small: 256 bytes and {END} need {SMALLEST}"
            raise UserError(Problem("vocabulary", rule, "write at least 512"))
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        library.train_from_iterator(texts, trainer)
        return cls(library, library.to_str().encode(), "the trained tokenizer")

    @classmethod
    def load(cls, source: Path | str | bytes) -> Tokenizer:
        """Reads a `tokenizer.json`.

        Args:
            source: the file, or its contents.

        Raises:
            UserError: there is no such file, it is no tokenizer, or it has no token for the end of a document.
        """
        where = "tokenizer" if isinstance(source, bytes) else str(source)
        try:
            json = source if isinstance(source, bytes) else files.read(Path(source))
            library = Library.from_str(json.decode())
        except OSError as error:
            raise UserError(Problem(where, f"cannot be read: {error.strerror}", "give a tokenizer.json")) from None
        except Exception as error:  # the library raises plain Exception, whatever is wrong with the file
            raise UserError(Problem(where, f"is no tokenizer: {error}", "give a tokenizer.json")) from None
        return cls(library, json, where)

    @property
    def sha256(self) -> str:
        """SHA-256 of `json`, by which data and checkpoints recognise their tokenizer."""
        return hashlib.sha256(self.json).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without an end token."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """The tokens of several texts, on all cores; like `encode`, without end tokens."""
        pieces = [_pieces(text) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        encoded = iter(self._library.encode_batch_fast(flat, add_special_tokens=False))
        return [np.concatenate([np.array(next(encoded).ids, dtype=np.uint32) for _ in parts]) for parts in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens; bytes that are no UTF-8, as in half a character, become U+FFFD."""
        text: str = self._library.decode(list(ids), skip_special_tokens=False)
        return text


def _pieces(text: str) -> list[str]:
    """Cuts a long text at line ends, never losing a character."""
    pieces = []
    at = 0
    while len(text) - at > PIECE:
        cut = text.rfind("\n", at, at + PIECE) + 1
        cut = cut if cut > at else at + PIECE
        pieces.append(text[at:cut])
        at = cut
    return [*pieces, text[at:]]
