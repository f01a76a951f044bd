"""GPT-2 and Llama by their published formulas, in NumPy, on Hugging Face's files as they are: nothing here is hpcmp's.

Radford et al., 2019, and Touvron et al., 2023, as transformers computes them: modeling_gpt2.py, modeling_llama.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, name -> array) of a folder."""
    weights = {}
    for path in folder.glob("*.safetensors"):
        text = path.read_bytes()
        length = int.from_bytes(text[:8], "little")
        header = json.loads(text[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            if entry["dtype"] == "BF16":  # the upper half of a float32
                array = (np.frombuffer(text[begin:end], "<u2").astype("<u4") << 16).view("<f4")
            else:
                array = np.frombuffer(text[begin:end], TYPES[entry["dtype"]])
            assert name not in weights
            weights[name] = array.reshape(entry["shape"])
    return json.loads((folder / "config.json").read_text()), weights


def logits(folder: Path, tokens: Any) -> Any:
    """The scores of every token after each of ``tokens`` (positions,), in float64: (positions, vocabulary)."""
    config, weights = read(folder)
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    return (_gpt2 if config["model_type"] == "gpt2" else _llama)(config, weights, tokens)


def _softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _attention(q: Any, k: Any, v: Any) -> Any:
    """One head, (positions, head_size) each."""
    scores = q @ k.T / np.sqrt(q.shape[-1])
    return _softmax(np.where(np.tril(np.ones(scores.shape, bool)), scores, -np.inf)) @ v


def _gpt2(config: dict[str, Any], w: dict[str, Any], tokens: Any) -> Any:
    def norm(x: Any, name: str) -> Any:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        z = (x - mean) / np.sqrt(variance + config["layer_norm_epsilon"])
        return z * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv1d(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][np.arange(len(tokens))]
    for i in range(config["n_layer"]):
        h = f"transformer.h.{i}"
        query, key, value = np.split(conv1d(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn"), 3, axis=-1)
        d = config["n_embd"] // config["n_head"]
        heads = [slice(n * d, (n + 1) * d) for n in range(config["n_head"])]
        o = np.concatenate([_attention(query[:, s], key[:, s], value[:, s]) for s in heads], -1)
        x = x + conv1d(o, f"{h}.attn.c_proj")
        inner = conv1d(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        x = x + conv1d(inner, f"{h}.mlp.c_proj")
    head = w["transformer.wte.weight"] if config["tie_word_embeddings"] else w["lm_head.weight"]
    return norm(x, "transformer.ln_f") @ head.T


def _llama(config: dict[str, Any], w: dict[str, Any], tokens: Any) -> Any:
    d, heads, shared = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]

    def norm(x: Any, name: str) -> Any:
        return w[name] * (x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]))

    def linear(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    frequencies = 1 / config["rope_theta"] ** (np.arange(0, d, 2) / d)
    angles = np.arange(len(tokens))[:, None] * frequencies
    cos, sin = (np.concatenate([f(angles), f(angles)], -1) for f in (np.cos, np.sin))

    def turn(x: Any) -> Any:
        half = np.concatenate([-x[:, d // 2 :], x[:, : d // 2]], -1)
        return x * cos + half * sin

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = norm(x, f"{layer}.input_layernorm.weight")
        query, key, value = (
            linear(y, f"{layer}.self_attn.{name}_proj").reshape(len(tokens), -1, d) for name in ("q", "k", "v")
        )
        assert query.shape[1] == heads and key.shape[1] == value.shape[1] == shared
        o = []
        for n in range(heads):
            k = n // (heads // shared)
            o.append(_attention(turn(query[:, n]), turn(key[:, k]), value[:, k]))
        x = x + linear(np.concatenate(o, -1), f"{layer}.self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm.weight")
        gate = linear(y, f"{layer}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    head = w["model.embed_tokens.weight"] if config["tie_word_embeddings"] else w["lm_head.weight"]
    return norm(x, "model.norm.weight") @ head.T
