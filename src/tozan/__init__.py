"""tozan: trains large language models on CPU supercomputers, clusters and any machine PyTorch runs on."""

__version__ = "0.1.0"
