import subprocess
import sys

import torch

from tozan.ops.compiler import beginning, eager

STEP = """
import sys
import torch
import tozan.train
from tozan import models
from tozan.config.schema import Optim
from tozan.models.arithmetic import Shape
from tozan.ops.compiler import beginning
from tozan.optim.adamw import AdamW

shape = Shape("llama", 1, 32, 2, 2, 64, 96, 16, True, 1e-5, 10000.0, 0.0)
model = models.create(shape, 0)
optimizer = AdamW(dict(model.named_parameters()), Optim())
x = torch.zeros(1, 16, dtype=torch.int64)
with torch.autocast("cpu", torch.bfloat16):
    y = model(x, x)
beginning(y, torch.ones_like(y)).backward()
optimizer.step(1e-3)
optimizer.zero_grad()
print(*(name for name in sys.modules if name in ("torch._dynamo", "torch._inductor", "sympy")))
"""


def test_a_step_that_compiles_nothing_does_not_import_the_compiler():
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []


def test_a_backward_pass_begins_with_the_gradient_it_is_given():
    x, gradient = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    with torch.no_grad():
        beginning(x, gradient).backward()
    assert torch.equal(x.grad, gradient)
    (again,) = torch.autograd.grad(beginning(x.tanh(), gradient), x)
    assert torch.equal(again, torch.autograd.grad(x.tanh(), x, gradient)[0])


def test_what_is_eager_and_all_that_it_calls_stay_out_of_graphs():
    seen = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    def inner(x):
        return x.sin()

    @eager
    def left_alone(x):
        assert not torch.compiler.is_compiling()
        return inner(x).tan()

    x = torch.randn(3, requires_grad=True)
    compiled = torch.compile(lambda x: left_alone(x.cos()) * 2, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), x.cos().sin().tan() * 2)
    assert "cos" in seen
    assert not {"sin", "tan"} & set(seen)
