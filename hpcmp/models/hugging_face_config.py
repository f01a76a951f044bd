"""``config.json`` of Hugging Face's GPT-2 and Llama, to and from the model's part of a configuration.

Sources: transformers, models/gpt2/configuration_gpt2.py and models/llama/configuration_llama.py; a key that is left out
has the default given there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .architecture import Architecture

#: (our key, theirs, their default); the type of the default is that of the key.
_GPT2: tuple[tuple[str, str, Any], ...] = (
    ("vocabulary", "vocab_size", 50257),
    ("sequence", "n_positions", 1024),
    ("hidden", "n_embd", 768),
    ("layers", "n_layer", 12),
    ("heads", "n_head", 12),
    ("norm_epsilon", "layer_norm_epsilon", 1e-5),
    ("init_std", "initializer_range", 0.02),
    ("tied", "tie_word_embeddings", True),
)
_LLAMA: tuple[tuple[str, str, Any], ...] = (
    ("vocabulary", "vocab_size", 32000),
    ("sequence", "max_position_embeddings", 2048),
    ("hidden", "hidden_size", 4096),
    ("ffn", "intermediate_size", 11008),
    ("layers", "num_hidden_layers", 32),
    ("heads", "num_attention_heads", 32),
    ("norm_epsilon", "rms_norm_eps", 1e-6),
    ("rope_theta", "rope_theta", 10000.0),
    ("init_std", "initializer_range", 0.02),
    ("tied", "tie_word_embeddings", False),
    ("bias", "attention_bias", False),
)
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")

#: What their configurations can ask for and our models are not: key -> the values that ask for nothing.
_GPT2_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_LLAMA_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "partial_rotary_factor": (1,),
}


def to_config(a: Architecture, dtype: str, end_of_document: int | None) -> dict[str, Any]:
    """The content of ``config.json`` for a model that ``hugging_face.check`` lets pass, its numbers of ``dtype``."""
    gpt = a.style == "gpt"
    names = {
        "architectures": ["GPT2LMHeadModel" if gpt else "LlamaForCausalLM"],
        "model_type": "gpt2" if gpt else "llama",
    }
    sizes = {theirs: getattr(a, ours) for ours, theirs, _ in (_GPT2 if gpt else _LLAMA)}
    if gpt:
        more = {"n_inner": a.ffn, "activation_function": "gelu_new"} | dict.fromkeys(_DROPOUTS, a.dropout)
    else:
        more = {
            "num_key_value_heads": a.kv_heads,
            "head_dim": a.head_size,
            "hidden_act": "silu",
            "rope_scaling": None,
            "mlp_bias": a.bias,
        }
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_document)
    return names | sizes | more | tokens | {"torch_dtype": dtype}


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the section ``model`` that a ``config.json`` gives. Raises InputError naming the key that is
    missing, of another type, or asks for what our models are not."""
    kind = config.get("model_type")
    if kind not in ("gpt2", "llama"):
        raise InputError(f'model_type = {kind!r}: only "gpt2" and "llama" are imported')
    for key, allowed in (_GPT2_FIXED if kind == "gpt2" else _LLAMA_FIXED).items():
        if (value := config.get(key, allowed[0])) not in allowed:
            raise InputError(f"{key} = {_short(value)}: only {' or '.join(map(_short, allowed))} is imported")
    return _from_gpt2(config) if kind == "gpt2" else _from_llama(config)


def _from_gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    model = {ours: _take(config, theirs, default) for ours, theirs, default in _GPT2}
    rates = {_take(config, key, 0.1) for key in _DROPOUTS}
    if len(rates) > 1:
        raise InputError(f"{', '.join(_DROPOUTS)} differ: there is one model.dropout")
    ffn = 4 * model["hidden"] if config.get("n_inner") is None else _take(config, "n_inner", 1)
    return model | {"style": "gpt", "ffn": ffn, "bias": True, "dropout": rates.pop()}


def _from_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}  # where newer versions of transformers keep rope_theta
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise InputError(f"rope_parameters = {_short(rope)}: only the default is imported")
    if "rope_theta" in rope:
        config = {**config, "rope_theta": rope["rope_theta"]}
    model = {ours: _take(config, theirs, default) for ours, theirs, default in _LLAMA}
    if _take(config, "mlp_bias", False) != model["bias"]:
        raise InputError("attention_bias and mlp_bias differ: there is one model.bias")
    for ours, theirs in (("kv_heads", "num_key_value_heads"), ("head_size", "head_dim")):
        if config.get(theirs) is not None:
            model[ours] = _take(config, theirs, 1)
    return model | {"style": "llama"}


def _take(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of a key, of the type of its default: a whole number does for another."""
    value = config.get(key, default)
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if type(value) not in kinds or not abs(value) < 2**62:
        raise InputError(f"{key} = {_short(value)} is not {'a number' if kinds[0] is int else 'true or false'}")
    return type(default)(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
