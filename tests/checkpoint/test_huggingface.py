"""Both ways between tozan's models and transformers', against transformers itself."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tozan.checkpoint import huggingface
from tozan.errors import UserError
from tozan.models import Shape, create

SHAPES = {
    "gpt2": Shape("gpt2", 2, 32, 4, 4, 96, 99, 16),
    "gpt2-untied": Shape("gpt2", 2, 32, 4, 4, 128, 99, 16, tied=False, norm_eps=1e-6, dropout=0.25),
    "llama": Shape("llama", 2, 32, 4, 4, 64, 99, 16),
    "llama-grouped-untied": Shape("llama", 2, 32, 4, 2, 48, 99, 16, tied=False, norm_eps=1e-6, rope_base=500.0),
}
TOKENS = torch.randint(0, 99, (2, 16), generator=torch.Generator().manual_seed(0))


def transformers_model(shape: Shape) -> torch.nn.Module:
    """A randomly initialised transformers model of this shape; all weights random, norms and biases too."""
    torch.manual_seed(0)
    if shape.family == "gpt2":
        config = GPT2Config(
            n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, n_inner=shape.mlp_width,
            vocab_size=shape.vocabulary, n_positions=shape.sequence, tie_word_embeddings=shape.tied,
            layer_norm_epsilon=shape.norm_eps, resid_pdrop=shape.dropout,
            bos_token_id=None, eos_token_id=None, attn_implementation="eager",
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            num_hidden_layers=shape.layers, hidden_size=shape.width, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, intermediate_size=shape.mlp_width, vocab_size=shape.vocabulary,
            max_position_embeddings=shape.sequence, tie_word_embeddings=shape.tied, rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_theta": shape.rope_base, "rope_type": "default"},
            bos_token_id=None, eos_token_id=None, attn_implementation="eager",
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def ours(shape: Shape, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = create(shape, seed=0)
    model.load_state_dict(tensors)
    return model.eval()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shards", ["whole", "sharded"])
def test_what_transformers_saves_gives_the_same_logits_here(name, shards, tmp_path):
    reference = transformers_model(SHAPES[name])
    reference.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "sharded" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "sharded")
    shape, tensors = huggingface.load(tmp_path)
    assert shape == SHAPES[name]
    with torch.no_grad():
        torch.testing.assert_close(ours(shape, tensors)(TOKENS), reference(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_what_we_save_gives_the_same_logits_in_transformers(name, shard_bytes, tmp_path):
    model = create(SHAPES[name], seed=3).eval()
    tensors = model.state_dict()
    huggingface.save(SHAPES[name], tensors, tmp_path / "out", shard_bytes=shard_bytes)
    assert (tmp_path / "out/model.safetensors.index.json").exists() == (shard_bytes == 20_000)
    reference, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), reference(TOKENS).logits, rtol=1e-5, atol=1e-6)
    shape, again = huggingface.load(tmp_path / "out")
    assert shape == SHAPES[name]
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly_and_given_as_fp32(dtype, tmp_path):
    reference = transformers_model(SHAPES["llama-grouped-untied"]).to(dtype)
    reference.save_pretrained(tmp_path)
    shape, tensors = huggingface.load(tmp_path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["blocks.1.mlp.gate.weight"], reference.model.layers[1].mlp.gate_proj.weight.float())
    huggingface.save(shape, {name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "out")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype


def test_tokenizer_goes_along(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.train_from_iterator(["a mountain is a mountain"], trainers.BpeTrainer(special_tokens=["<|end|>"]))
    data = library.to_str().encode()
    huggingface.save(SHAPES["gpt2"], create(SHAPES["gpt2"], 0).state_dict(), tmp_path / "out", data)
    assert huggingface.tokenizer_json(tmp_path / "out") == data
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a mountain")["input_ids"] == library.encode("a mountain").ids
    assert tokenizer.eos_token_id == library.token_to_id("<|end|>")
    assert GPT2Config.from_pretrained(tmp_path / "out").eos_token_id == library.token_to_id("<|end|>")


def test_first_release_of_gpt2_without_prefix_and_with_masks(tmp_path):
    reference = transformers_model(SHAPES["gpt2"])
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    save_file(tensors, file)
    _, loaded = huggingface.load(tmp_path)
    assert torch.equal(loaded["blocks.1.attn.qkv.weight"], reference.transformer.h[1].attn.c_attn.weight.T)


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def llama(tmp_path) -> Path:
    transformers_model(SHAPES["llama-grouped-untied"]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": None}, ["architectures"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "linear"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["rope_parameters", "yarn"]),
        (
            {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
            ["attention_bias", "mlp_bias", "hidden_act"],
        ),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"head_dim": 16}, ["head_dim 16", "hidden_size 32"]),
        ({"hidden_size": "32", "vocab_size": 0}, ["hidden_size", "vocab_size"]),
        ({"num_attention_heads": 5}, ["5 heads"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads 3"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings"]),
        ({"tie_word_embeddings": True}, ["lm_head.weight", "tie_word_embeddings"]),
        ({"num_hidden_layers": 3}, ["model.layers.2.self_attn.q_proj.weight"]),
        ({"num_hidden_layers": 1}, ["model.layers.1.self_attn.q_proj.weight"]),
        ({"vocab_size": 100}, ["model.embed_tokens.weight", "99 × 32", "100 × 32"]),
    ],
)
def test_config_that_does_not_fit_is_refused_by_name(llama, changes, named):
    edit(llama, **changes)
    with pytest.raises(UserError) as error:
        huggingface.load(llama)
    for word in named:
        assert word in str(error.value)


def test_gpt2_options_are_refused_by_name(tmp_path):
    transformers_model(SHAPES["gpt2"]).save_pretrained(tmp_path)
    edit(tmp_path, activation_function="relu", scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False)
    with pytest.raises(UserError) as error:
        huggingface.load(tmp_path)
    assert len(error.value.problems) == 3


def test_files_that_are_damaged_absent_or_pickled_are_refused(llama, tmp_path):
    weights = llama / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        huggingface.load(llama)
    weights.unlink()
    with pytest.raises(UserError, match="has neither"):
        huggingface.load(llama)
    (llama / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickle"):
        huggingface.load(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        huggingface.load(llama)
    (llama / "config.json").unlink()
    with pytest.raises(UserError, match="cannot read"):
        huggingface.load(llama)


def test_index_that_lies_is_refused(tmp_path):
    shape = SHAPES["llama"]
    huggingface.save(shape, create(shape, 0).state_dict(), tmp_path / "out", shard_bytes=20_000)
    index = tmp_path / "out/model.safetensors.index.json"
    good = json.loads(index.read_text())
    files = sorted(set(good["weight_map"].values()))
    wrong = good["weight_map"] | {"model.norm.weight": files[0]}
    index.write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(UserError, match=r"lacks model\.norm\.weight"):
        huggingface.load(tmp_path / "out")
    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"model.norm.weight": "../elsewhere"}}))
    with pytest.raises(UserError, match="elsewhere"):
        huggingface.load(tmp_path / "out")
    index.write_text(json.dumps(good))
    (tmp_path / "out" / files[1]).unlink()
    with pytest.raises(UserError, match=files[1]):
        huggingface.load(tmp_path / "out")


def test_integer_weights_are_refused(llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight: is I8"):
        huggingface.load(llama)


def test_save_names_all_tensors_that_do_not_fit_and_leaves_nothing(tmp_path):
    shape = SHAPES["gpt2"]
    tensors = create(shape, 0).state_dict()
    tensors["more"] = tensors.pop("norm.bias")
    tensors["embed.weight"] = tensors["embed.weight"][1:]
    tensors["position.weight"] = tensors["position.weight"].double()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(UserError) as error:
        huggingface.save(shape, tensors, tmp_path / "out")
    named = {problem.where for problem in error.value.problems}
    assert named == {"more", "norm.bias", "embed.weight", "position.weight", str(tmp_path / "out")}
    grouped = dataclasses.replace(shape, kv_heads=2)
    with pytest.raises(UserError, match="grouped"):
        huggingface.save(grouped, create(grouped, 0).state_dict(), tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
