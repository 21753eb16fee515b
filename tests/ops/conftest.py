import pytest

from tozan.ops import native


@pytest.fixture(params=["auto", "plain"])
def kernels(request):
    """Runs the test with compiled kernels, then in plain PyTorch; the machine must be able to compile."""
    native.choose(request.param)
    assert request.param == "plain" or native.status() == native.COMPILED
    yield request.param
    native.choose("auto")
