"""The chunked loss against torch's own cross-entropy, in every type."""

import pytest
import torch
import torch.nn.functional as F

from tozan.ops import cross_entropy, linear_cross_entropy, linear_cross_entropy_reference

TYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks and several blocks in each, the last ones uneven."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", {"cpu": 16 * 101})
    monkeypatch.setattr(cross_entropy, "_BLOCK_ELEMENTS", 5 * 101)
    yield
    torch.set_num_threads(threads)


def inputs(dtype=torch.float64, tokens=37, ignored=(), spread=1.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 24, generator=generator, dtype=torch.float64).mul(spread).to(dtype).requires_grad_()
    weight = torch.randn(101, 24, generator=generator, dtype=torch.float64).mul(0.2).to(dtype).requires_grad_()
    targets = torch.randint(0, 101, (tokens,), generator=generator)
    targets[list(ignored)] = -100
    return x, weight, targets


def exact(x, weight, targets):
    """Loss and gradients in fp64, from the same (rounded) inputs."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    loss = F.cross_entropy(x @ weight.T, targets, reduction="sum", ignore_index=-100)
    return loss, *torch.autograd.grad(loss, (x, weight))


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("ignored", [(), (0, 5, 36)])
def test_loss_and_gradients_equal_torch_in_fp64(kernels, dtype, ignored):
    x, weight, targets = inputs(dtype, ignored=ignored)
    loss = linear_cross_entropy(x, weight, targets)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found = torch.autograd.grad(loss, (x, weight))
    expected_loss, *expected = exact(x, weight, targets)
    assert abs(loss - expected_loss) <= TYPES[dtype] * expected_loss
    for gradient, reference, tensor in zip(found, expected, (x, weight), strict=True):
        assert gradient.dtype == tensor.dtype
        assert error(gradient, reference) <= TYPES[dtype]
    if ignored:
        assert not found[0][list(ignored)].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_close_to_fp64_as_the_plain_path(kernels, dtype):
    x, weight, targets = inputs(torch.float32)
    expected_loss, *expected = exact(x, weight, targets)
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(x, weight, targets)
        plain_loss = linear_cross_entropy_reference(x, weight, targets)
    assert loss.dtype == torch.float32
    assert abs(loss - expected_loss) <= max(1.1 * abs(plain_loss - expected_loss), 1e-3 * expected_loss)
    found, plain = torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(plain_loss, (x, weight))
    for gradient, other, reference in zip(found, plain, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert error(gradient, reference) <= 1.1 * error(other, reference)


def test_autocast_leaves_fp64_alone():
    x, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss, exact(x, weight, targets)[0], rtol=1e-13, atol=0)


def test_gradcheck():
    x, weight, targets = inputs(tokens=9, ignored=(3,))
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, targets), (x, weight), fast_mode=False)


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_one_gradient_alone(wanted):
    x, weight, targets = inputs()
    tensor, other = (x, weight) if wanted == "x" else (weight, x)
    other.requires_grad_(False)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), tensor)
    torch.testing.assert_close(gradient, exact(x, weight, targets)[1 if wanted == "x" else 2])


def test_fp16_gradients_do_not_vanish_or_overflow():
    """Probabilities near 1e-8 and a token seen 40,000 times: both are beyond fp16's own range."""
    tokens, vocabulary = 40_000, 8
    x = torch.full((tokens, 4), 2.0)
    weight = torch.zeros(vocabulary, 4)
    weight[0] = 2.3  # the target's logit is 18.4 above the others: their p is 1e-8
    targets = torch.zeros(tokens, dtype=torch.int64)
    x, weight = x.half().float().requires_grad_(), weight.half().float().requires_grad_()
    scale = 2.0**15
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(x, weight, targets) * scale
    _, *expected = exact(x, weight, targets)
    dx, dweight = (gradient / scale for gradient in torch.autograd.grad(loss, (x, weight)))
    assert error(dweight[1:], expected[1][1:]) < 1e-3  # 40,000 times 1e-8
    assert (dx - expected[0]).abs().max() < 1e-6  # fp32's own 1 - p
    targets.fill_(1)
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(x, weight, targets)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() > 65504
    assert error(gradient, exact(x, weight, targets)[2]) < 1e-3


def test_targets_of_negligible_probability_have_finite_loss(kernels):
    x, weight, targets = inputs(torch.float32, spread=300.0)
    loss = linear_cross_entropy(x, weight, targets)
    assert loss / len(targets) > 100
    torch.testing.assert_close(loss.double(), exact(x, weight, targets)[0], rtol=1e-6, atol=0)


def test_backward_multiplies_by_what_arrives_and_accumulates():
    x, weight, targets = inputs()
    (linear_cross_entropy(x, weight, targets) / 8).backward()
    (linear_cross_entropy(x, weight, targets) / 8).backward()
    _, dx, dweight = exact(x, weight, targets)
    torch.testing.assert_close(x.grad, dx / 4)
    torch.testing.assert_close(weight.grad, dweight / 4)


def test_a_second_backward_gives_the_same():
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, targets) * 3
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (x, weight))))


def test_without_gradients_the_loss_alone_is_computed(monkeypatch):
    x, weight, targets = inputs()
    expected = linear_cross_entropy(x, weight, targets)
    monkeypatch.setattr(cross_entropy._LinearCrossEntropy, "apply", None)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    assert linear_cross_entropy(x[:0].detach(), weight.detach(), targets[:0]).item() == 0.0


def test_all_ignored_gives_zero(kernels):
    x, weight, targets = inputs(ignored=range(37))
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss.item() == 0.0
    assert not x.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("wrong", [-1, 101])
def test_targets_outside_the_vocabulary_are_refused(kernels, wrong):
    x, weight, targets = inputs()
    targets[7] = wrong
    with pytest.raises(RuntimeError):
        linear_cross_entropy(x, weight, targets)


def test_bits_do_not_depend_on_threads():
    x, weight, targets = inputs(torch.float32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        loss = linear_cross_entropy(x, weight, targets)
        results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    assert torch.equal(results[0][0], results[1][0])


def test_memory_does_not_grow_with_the_batch(monkeypatch):
    """The largest tensor made while running is a chunk of logits, not all of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    x, weight, targets = inputs(torch.float32, tokens=400)
    with Largest() as largest:
        linear_cross_entropy(x, weight, targets).backward()
    assert largest.elements == x.numel() < 400 * 101 / 4


def test_compiled_callers_break_around_it():
    x, weight, targets = inputs(torch.float32)
    compiled = torch.compile(lambda a: linear_cross_entropy(a * 2, weight, targets) * 0.5, backend="aot_eager")
    loss = compiled(x)
    expected_loss, dx, _ = exact(x.detach() * 2, weight, targets)
    assert loss.item() == pytest.approx(expected_loss.item() / 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, x)
    assert error(gradient, dx) < 1e-5
