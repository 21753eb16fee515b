"""The texts a data set can be built from, each a stream of documents."""

from tozan.data.standard import standard_library

__all__ = ["standard_library"]
