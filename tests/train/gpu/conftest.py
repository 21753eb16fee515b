"""Tests on a GPU: collected by `make test-gpu` alone, which lets them see one."""

import torch


def pytest_ignore_collect(collection_path):
    """Elsewhere there is none of these tests, rather than tests that are skipped."""
    return None if torch.cuda.is_available() else True
