"""Small shapes of every kind, random models of them, and their twins in transformers."""

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from tozan.checkpoint import huggingface
from tozan.models import Shape, create

SHAPES = {
    "gpt2": Shape("gpt2", 3, 48, 4, 4, 128, 131, 24),
    "gpt2-untied": Shape("gpt2", 2, 32, 2, 2, 128, 131, 24, tied=False),
    "llama": Shape("llama", 2, 48, 4, 4, 96, 131, 24),
    "llama-grouped": Shape("llama", 3, 48, 6, 2, 96, 131, 24, norm_eps=1e-6, rope_base=500.0),
    "llama-grouped-untied": Shape("llama", 2, 32, 4, 1, 96, 131, 24, tied=False),
}


@pytest.fixture(params=SHAPES)
def shape(request):
    """Each of the shapes in turn."""
    return SHAPES[request.param]


@pytest.fixture(scope="session")
def shapes():
    return SHAPES


@pytest.fixture(scope="session")
def tokens():
    def draw(shape, samples=2, length=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, shape.vocabulary, (samples, length or shape.sequence), generator=generator)

    return draw


@pytest.fixture(scope="session")
def random_model():
    def build(shape):
        """Ours with every parameter random and large enough that no part of the network goes unseen."""
        model = create(shape, seed=1).eval()
        generator = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, mean=centre, std=0.15, generator=generator)
        return model

    return build


@pytest.fixture
def transformers_twin(tmp_path):
    def build(model):
        """The same weights in transformers' own class, with its plain attention."""
        huggingface.save(model.shape, model.state_dict(), tmp_path / "twin")
        family = GPT2LMHeadModel if model.shape.family == "gpt2" else LlamaForCausalLM
        return family.from_pretrained(tmp_path / "twin", attn_implementation="eager").eval()

    return build


@pytest.fixture(autouse=True)
def _small(one_thread):
    """Models here are."""
