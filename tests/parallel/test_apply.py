"""The door: a user's own module with a roles table, and refusals with their arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from ranks import spawn
from tensor_cases import SHAPES, assemble, create, distance
from torch import nn

from tozan.comm import Mesh
from tozan.errors import UserError
from tozan.layout import Layout
from tozan.parallel import apply as door


class Mixer(nn.Module):
    """A network that tozan has never seen: separate q, k and v, post-norms, a head that is called as a layer."""

    def __init__(self, heads=4, width=16, vocabulary=12):
        super().__init__()
        self.size = width // heads
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(8, width)
        # The softmax does not see a bias of k: its gradient is nothing but rounding.
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for bias in (True, False, True))
        self.back = nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 24), nn.SiLU(), nn.Linear(24, width, bias=False))
        self.after = nn.ModuleList([nn.LayerNorm(width), nn.RMSNorm(width, 1e-6)])
        self.answer = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = self.after[0](x + self.back(y))
        return self.answer(self.after[1](x + self.inner(x)))


ROLES = {
    "words": "vocab",
    "places": "position",
    "q": "col:4",
    "k": "col:4",
    "v": "col:4",
    "back": "row",
    "inner.0": "col",
    "inner.2": "row",
    "after.*": "norm",
    "answer": "vocab",
}
LAYOUTS = [
    (Layout(tp=2), False),
    (Layout(tp=4), True),
    (Layout(tp=4, scheme="2d"), False),
    (Layout(tp=2, scheme="2.5d", tp_depth=2), False),
]


def mixer(tie=False):
    torch.manual_seed(4)
    model = Mixer().double()
    if tie:
        model.answer.weight = model.words.weight
    return model


def foreign(layout, sequence, tie):
    mesh = Mesh.create(layout, timeout_s=30)
    whole, model = mixer(tie), mixer(tie)
    placements = door.apply(model, mesh, ROLES, sequence=sequence)
    tokens = torch.randint(0, 12, (4, 8), generator=torch.Generator().manual_seed(2))
    logits, expected = model(tokens), whole(tokens)
    for output in (logits, expected):
        F.cross_entropy(output.flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    door.synchronize(dict(model.named_parameters()), placements, mesh)
    named = dict(whole.named_parameters())
    assert list(placements) == list(named)
    gradients = (
        distance(assemble(p.grad, placements[name], mesh), named[name].grad) for name, p in model.named_parameters()
    )
    return max(distance(logits, expected), *gradients)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("layout", "sequence"), LAYOUTS)
def test_a_users_own_module(layout, sequence, tie):
    assert max(spawn(layout.tp, foreign, layout, sequence, tie)) < 1e-10


def round_trip(layout, sequence):
    """A module of products only: the caller brings activations in and out."""
    mesh = Mesh.create(layout, timeout_s=30)
    torch.manual_seed(4)
    whole = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double()
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double()
    model.load_state_dict(whole.state_dict())
    x = torch.randn(4, 4, 8, dtype=torch.float64)
    inside, outside = x.clone().requires_grad_(), x.clone().requires_grad_()
    door.apply(model, mesh, {"0": "col", "2": "row"}, sequence=sequence)
    scheme = door.create(mesh, sequence)
    part = scheme.enter(inside)
    assert part.shape == scheme.local_shape(4, 4, 8)
    y, expected = scheme.leave(model(part)), whole(outside)
    y.square().sum().backward()
    expected.square().sum().backward()
    return max(distance(y, expected), distance(inside.grad, outside.grad))


@pytest.mark.parametrize(("layout", "sequence"), LAYOUTS)
def test_enter_and_leave(layout, sequence):
    assert max(spawn(layout.tp, round_trip, layout, sequence)) < 1e-10


def problems(model, layout, roles=None, **options):
    """The text of everything that `check` finds, which needs no ranks."""
    return "\n".join(map(str, door.check(model, layout, roles or model.roles, **options)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"wrods": "vocab"}, "roles['wrods']: no module has such a name"),
        ({"middle.back": "row"}, "did you mean back?"),
        ({"back": "rows"}, "'rows' is no role\n    → use one of vocab, position, norm, qkv, col, row"),
        ({"back": "row:4"}, "states units that role row has not"),
        ({"b*": "col"}, "back is 'row' by another pattern and 'col' by this one"),
        ({"q": "qkv"}, "the numbers of heads are not known\n    → write them: qkv:32/8"),
        ({"q": "col:3"}, "units of outputs 3 over tp = 2: 1 left over\n    → 3 splits by 1, 3"),
        ({"after.0": "row", "after.*": "row"}, "is a LayerNorm\n    → the 1d scheme shards nn.Linear"),
    ],
)
def test_mistakes_in_a_table_are_all_named(change, expected):
    assert expected in problems(Mixer(), Layout(tp=2), ROLES | change)


def test_a_parameter_without_a_role_is_refused():
    roles = {name: role for name, role in ROLES.items() if name != "back"}
    assert "back: has parameters (weight, bias) but no role" in problems(Mixer(), Layout(tp=2), roles)


@pytest.mark.parametrize(
    ("name", "layout", "expected"),
    [
        ("llama", Layout(tp=4), "key/value heads 2 over tp = 4: 2 left over"),
        ("gpt2", Layout(tp=3), "vocabulary"),
        ("gpt2", Layout(tp=5), "query heads 4 over tp = 5: 4 left over\n    → 4 splits by 1, 2, 4"),
        ("gpt2", Layout(tp=9, scheme="2d"), "inputs 16 over a side of q = 3 (tp = 9): 1 left over"),
        ("gpt2", Layout(tp=18, scheme="2.5d", tp_depth=2), "query heads 4 over a side of q = 3"),
    ],
)
def test_sizes_that_do_not_split_are_refused_with_the_arithmetic(name, layout, expected):
    found = problems(create(SHAPES[name]), layout)
    assert (expected in found) == (name != "gpt2" or layout.tp != 3 or SHAPES["gpt2"].vocabulary % 3 != 0)


def test_dropout_and_sequence_parallelism_of_a_sharded_stream_are_refused():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "drop": nn.Dropout(0.1)})
    grid = Layout(tp=4, scheme="2d")
    assert "dropout 0.1 where ranks hold different tokens" in problems(model, grid, {"fc": "col"})
    assert "dropout" not in problems(model, Layout(tp=4), {"fc": "col"})
    assert "dropout" in problems(model, Layout(tp=4), {"fc": "col"}, sequence=True)
    assert "shards the residual stream already" in problems(model, grid, {"fc": "col"}, sequence=True)


def refused():
    mesh = Mesh.create(Layout(tp=2), timeout_s=30)
    model = Mixer()
    before = dict(model.named_parameters())
    with pytest.raises(UserError) as error:
        door.apply(model, mesh, ROLES | {"q": "col:3", "k": "nothing"})
    assert len(error.value.problems) == 3  # k has neither a good role nor any
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())


def test_a_refused_model_is_left_as_it_was():
    spawn(2, refused)
