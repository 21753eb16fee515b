import torch
from torch import nn

from tozan.config.schema import Optim
from tozan.optim.adamw import AdamW


def reference_step(p, g, m, v, t, lr, table, decay):
    """AdamW by the paper (arXiv 1711.05101, algorithm 2), in fp64."""
    m = table.beta1 * m + (1 - table.beta1) * g
    v = table.beta2 * v + (1 - table.beta2) * g * g
    m_hat, v_hat = m / (1 - table.beta1**t), v / (1 - table.beta2**t)
    return p - lr * decay * p - lr * m_hat / (v_hat.sqrt() + table.eps), m, v


def make():
    torch.manual_seed(0)
    return {"b.weight": nn.Parameter(torch.randn(5, 3)), "a.bias": nn.Parameter(torch.randn(4))}


def test_matches_the_paper_in_fp64_and_spares_vectors_from_decay():
    table = Optim(lr=1e-2, weight_decay=0.3)
    parameters = make()
    optimizer = AdamW(parameters, table)
    expected = {
        n: (p.detach().double(), torch.zeros_like(p).double(), torch.zeros_like(p).double())
        for n, p in parameters.items()
    }
    for t in range(1, 20):
        lr = 1e-2 / t
        for name, parameter in parameters.items():
            parameter.grad = torch.randn_like(parameter)
            decay = 0.3 if parameter.ndim == 2 else 0.0
            expected[name] = reference_step(
                expected[name][0], parameter.grad.double(), *expected[name][1:], t, lr, table, decay
            )
        optimizer.step(lr)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name][0], rtol=1e-5, atol=1e-6)


def test_state_moves_to_another_optimizer_by_name_bit_for_bit():
    table = Optim()
    first, second = make(), make()
    one = AdamW(first, table)
    other = AdamW(dict(reversed(second.items())), table)
    gradients = [{n: torch.randn_like(p) for n, p in first.items()} for _ in range(6)]

    def step(optimizer, parameters, gradient):
        for name, parameter in parameters.items():
            parameter.grad = gradient[name].clone()
        optimizer.step(1e-3)

    for gradient in gradients[:3]:
        step(one, first, gradient)
    for name, tensor in other.tensors().items():
        tensor.copy_(one.tensors()[name])
    other.updates = one.updates
    with torch.no_grad():
        for name in first:
            second[name].copy_(first[name])
    for gradient in gradients[3:]:
        step(one, first, gradient)
        step(other, second, gradient)
    for name in first:
        assert torch.equal(first[name], second[name])
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name])
    assert one.updates == other.updates == 6
