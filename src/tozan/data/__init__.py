"""Text to tar shards to samples.

`build` turns documents into a data set, `Dataset` reads it where it lies, `inspect` describes it, `verify` finds
what is wrong with it; `corpus` has the texts that are free to take. Nothing here needs torch.
"""

from tozan.data import corpus
from tozan.data.build import build
from tozan.data.dataset import Dataset
from tozan.data.document import Document
from tozan.data.inspect import Description, inspect
from tozan.data.manifest import Manifest
from tozan.data.tokenizer import Tokenizer
from tozan.data.verify import verify

__all__ = ["Dataset", "Description", "Document", "Manifest", "Tokenizer", "build", "corpus", "inspect", "verify"]
