"""Pages and figures from a run's files; torch-free, so that a login node or a laptop can draw them."""

from tozan.report.page import write

__all__ = ["write"]
