"""For all tests: hypothesis keeps no time, nothing is skipped where everything is required, and what many need."""

import os

import pytest
from hypothesis import settings

# What is tested is the CPU, whatever this machine has; `make test-gpu` sees its GPUs.
if os.environ.get("TOZAN_GPU_TESTS") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A shared machine may stall any example.
settings.register_profile("house", deadline=None)
settings.load_profile("house")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With TOZAN_REQUIRE_ALL=1 (CI), a test that would be skipped for a missing component fails."""
    report = yield
    if report.skipped and os.environ.get("TOZAN_REQUIRE_ALL") == "1":
        report.outcome = "failed"
        report.longrepr = f"TOZAN_REQUIRE_ALL=1 forbids skipping: {call.excinfo.value if call.excinfo else ''}"
    return report


@pytest.fixture
def one_thread():
    """PyTorch computes on one thread: small tensors gain nothing from more, and lose much on a busy machine."""
    import torch  # which many tests need not

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
