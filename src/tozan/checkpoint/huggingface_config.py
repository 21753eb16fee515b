"""The `config.json` of Hugging Face's `transformers` as a shape, and a shape as a `config.json`.

What tozan's models do not compute alike is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tozan import files
from tozan.errors import Problem, UserError
from tozan.models.arithmetic import Family, Shape

_FAMILIES: dict[str, Family] = {"GPT2LMHeadModel": "gpt2", "LlamaForCausalLM": "llama"}
_REQUIRED = {
    "gpt2": ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions"),
    "llama": (
        *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
        *("vocab_size", "max_position_embeddings"),
    ),
}
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
    "llama": {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "quantization_config": (None,),
    },
}
"""Options and the values that tozan's models compute; the first is also what a config without the option means."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    with files.naming(path, "read"):
        data = files.read(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(str(path), f"is no JSON: {error}", "copy the file again from its source")) from error
    if not isinstance(value, dict):
        raise UserError(Problem(str(path), f"holds a {type(value).__name__}; needs an object", "copy it again"))
    return value


def read_shape(path: Path) -> Shape:
    """The shape that a config.json describes.

    Raises:
        UserError: every option that is missing, of the wrong type, or that tozan's models do not compute.
    """
    config = read_json(path)
    architecture = (config.get("architectures") or [None])[0] if isinstance(config.get("architectures"), list) else None
    if architecture not in _FAMILIES:
        what = f"architectures is {json.dumps(config.get('architectures'))}; tozan has {', '.join(_FAMILIES)}"
        raise UserError(Problem(f"{path}: architectures", what, "convert a model of one of these architectures"))
    family = _FAMILIES[architecture]
    problems = [*_size_problems(path, config, family), *_option_problems(path, config, family)]
    if problems:
        raise UserError(*problems)
    return _gpt2_shape(config) if family == "gpt2" else _llama_shape(config)


def _gpt2_shape(config: dict[str, Any]) -> Shape:
    """The shape of a checked GPT-2 config; what is left out has the defaults of `transformers`."""
    return Shape(
        family="gpt2",
        layers=config["n_layer"],
        width=config["n_embd"],
        heads=config["n_head"],
        kv_heads=config["n_head"],
        mlp_width=config.get("n_inner") or 4 * config["n_embd"],
        vocabulary=config["vocab_size"],
        sequence=config["n_positions"],
        tied=config.get("tie_word_embeddings", True),
        norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        dropout=float(config.get("resid_pdrop", 0.1)),
    )


def _llama_shape(config: dict[str, Any]) -> Shape:
    """The shape of a checked LLaMA config; what is left out has the defaults of `transformers`."""
    rope = config.get("rope_parameters") or {}
    return Shape(
        family="llama",
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        sequence=config["max_position_embeddings"],
        tied=config.get("tie_word_embeddings", False),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_base=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
    )


def _size_problems(path: Path, config: dict[str, Any], family: str) -> list[Problem]:
    """Sizes and numbers that are missing, of the wrong type, or do not divide."""
    found = []
    optional = ("n_inner",) if family == "gpt2" else ("num_key_value_heads", "head_dim")
    for key in (*_REQUIRED[family], *(key for key in optional if config.get(key) is not None)):
        value = config.get(key)
        if type(value) is not int or value < 1:
            what = f"{key} is {json.dumps(value)}; needs a whole number from 1 up"
            found.append(Problem(f"{path}: {key}", what, "copy the file again from its source"))
    for key in ("layer_norm_epsilon", "rms_norm_eps", "resid_pdrop", "rope_theta"):
        value = config.get(key, 0.0)
        if type(value) not in (int, float) or not 0.0 <= value < float("inf"):
            found.append(Problem(f"{path}: {key}", f"{key} is {json.dumps(value)}; needs a number", "write a number"))
    if type(config.get("tie_word_embeddings", True)) is not bool:
        what = f"tie_word_embeddings is {json.dumps(config['tie_word_embeddings'])}; needs true or false"
        found.append(Problem(f"{path}: tie_word_embeddings", what, "write true or false"))
    return found or _division_problems(path, config, family)


def _division_problems(path: Path, config: dict[str, Any], family: str) -> list[Problem]:
    """Head counts that do not divide what they have to."""
    width, heads = (config[key] for key in _REQUIRED[family][1:3])
    kv_heads = config.get("num_key_value_heads") or heads if family == "llama" else heads
    found = []
    if width % heads:
        found.append(Problem(str(path), f"width {width} is no multiple of its {heads} heads", "check both numbers"))
    elif family == "llama" and width // heads % 2:
        what = f"width {width} / {heads} heads = {width // heads}; rotary positions need an even head size"
        found.append(Problem(str(path), what, "check both numbers"))
    if heads % kv_heads:
        what = f"{heads} heads are no multiple of num_key_value_heads {kv_heads}"
        found.append(Problem(f"{path}: num_key_value_heads", what, "check both numbers"))
    if config.get("head_dim") is not None and config["head_dim"] * heads != width and family == "llama":
        what = f"head_dim {config['head_dim']} × {heads} heads ≠ hidden_size {width}; tozan has no such model"
        found.append(Problem(f"{path}: head_dim", what, "convert a model with head_dim = hidden_size / heads"))
    return found


def _option_problems(path: Path, config: dict[str, Any], family: str) -> list[Problem]:
    """Options whose value changes the computation in a way that tozan's models do not have."""
    found = []
    for key, allowed in _FIXED[family].items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            what = f"{key} is {json.dumps(value)}; tozan computes {' or '.join(map(json.dumps, allowed))}"
            found.append(Problem(f"{path}: {key}", what, "convert a model without this option"))
    if family == "llama":
        for key in ("rope_scaling", "rope_parameters"):
            rope = config.get(key) or {}
            kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
            theta = rope.get("rope_theta", 1.0) if isinstance(rope, dict) else 1.0
            if kind != "default":
                what = f"{key} is {json.dumps(config[key])}; tozan computes unscaled rotary positions"
                found.append(Problem(f"{path}: {key}", what, "convert a model without scaled positions"))
            elif type(theta) not in (int, float) or not 0.0 < theta < float("inf"):
                what = f"rope_theta is {json.dumps(theta)}; needs a number above 0"
                found.append(Problem(f"{path}: {key}", what, "10000 is LLaMA's"))
    return found


def to_config(shape: Shape) -> dict[str, Any]:
    """config.json as `transformers` reads it, whichever its version."""
    if shape.family == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": shape.layers,
            "n_embd": shape.width,
            "n_head": shape.heads,
            "n_inner": shape.mlp_width,
            "n_positions": shape.sequence,
            "vocab_size": shape.vocabulary,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": shape.norm_eps,
            "embd_pdrop": shape.dropout,
            "resid_pdrop": shape.dropout,
            "attn_pdrop": 0.0,
            "tie_word_embeddings": shape.tied,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "intermediate_size": shape.mlp_width,
        "max_position_embeddings": shape.sequence,
        "vocab_size": shape.vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_base,
        "rope_parameters": {"rope_theta": shape.rope_base, "rope_type": "default"},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
    }


def to_json(value: dict[str, Any]) -> bytes:
    """JSON as people can read it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
