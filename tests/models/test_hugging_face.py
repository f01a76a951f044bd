"""Hugging Face's names: every number of ours has one place in theirs; configurations both ways, or a refusal."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from hpcmp.checkpoint.relayout import fill
from hpcmp.checkpoint.slab import Region
from hpcmp.errors import InputError
from hpcmp.models.architecture import Architecture
from hpcmp.models.hugging_face import find, is_weight, ours, tensors
from hpcmp.models.hugging_face_config import from_config, to_config
from hpcmp.models.transformer import build

GPT = Architecture("gpt", 2, 20, 5, 5, 4, 7, 11, 6)
LLAMA = Architecture("llama", 3, 18, 6, 2, 4, 7, 13, 9, tied=False, bias=False)
ARCHITECTURES = {
    "gpt": GPT,
    "gpt, not tied": dataclasses.replace(GPT, tied=False),
    "llama": LLAMA,
    "llama, one head, tied": dataclasses.replace(LLAMA, heads=1, kv_heads=1, tied=True),
    "llama, biases": dataclasses.replace(LLAMA, bias=True, kv_heads=3),
}

every = pytest.mark.parametrize("a", ARCHITECTURES.values(), ids=list(ARCHITECTURES))


def cut(array: Any, region: Region) -> Any:
    return array[tuple(slice(a, a + n) for a, n in zip(region.start, region.count, strict=True))]


def whole(shape: tuple[int, ...]) -> Region:
    return Region((0,) * len(shape), shape)


@every
def test_names_and_shapes_of_ours_are_those_of_the_model(a: Architecture) -> None:
    assert {name: shape for name, (shape, _) in ours(a).items()} == {p.name: p.shape for p in build(a).parameters()}


@every
def test_every_number_of_ours_has_one_place_in_theirs(a: Architecture) -> None:
    """Numbered through, ours fill theirs without a gap, and come back; also in parts."""
    numbered, first = {}, 1
    for name, (shape, _) in ours(a).items():
        numbered[name] = np.arange(first, first + np.prod(shape)).reshape(shape)
        first += numbered[name].size
    made = {}
    for tensor in tensors(a):
        made[tensor.name] = np.zeros(tensor.view, int)
        rows = len(made[tensor.name])
        for at in range(rows):
            region = Region((at, *(0,) * (len(tensor.view) - 1)), (1, *tensor.view[1:]))
            for part in tensor.parts:
                source = numbered[part.name]
                fill(cut(made[tensor.name], region), region, part.theirs, part.ours, lambda r, s=source: cut(s, r))
        assert np.prod(tensor.shape) == np.prod(tensor.view)
    assert sorted(np.concatenate([x.ravel() for x in made.values()])) == list(range(1, first))
    for name, (shape, parts) in ours(a).items():
        back = np.zeros(shape, int)
        for tensor, part in parts:
            source = made[tensor.name]
            fill(back, whole(shape), part.ours, part.theirs, lambda r, s=source: cut(s, r))
        np.testing.assert_array_equal(back, numbered[name])


def test_names_and_shapes_of_theirs() -> None:
    """As transformers has them (printed from GPT2LMHeadModel and LlamaForCausalLM)."""
    gpt = {tensor.name: tensor.shape for tensor in tensors(GPT)}
    assert gpt["transformer.wte.weight"] == (11, 20) and gpt["transformer.wpe.weight"] == (6, 20)
    assert gpt["transformer.h.1.attn.c_attn.weight"] == (20, 60) and gpt["transformer.h.1.attn.c_attn.bias"] == (60,)
    assert gpt["transformer.h.0.mlp.c_fc.weight"] == (20, 7) and gpt["transformer.h.0.mlp.c_proj.weight"] == (7, 20)
    assert "lm_head.weight" not in gpt and len(gpt) == 4 + 2 * 12
    llama = {tensor.name: tensor.shape for tensor in tensors(LLAMA)}
    assert llama["model.embed_tokens.weight"] == llama["lm_head.weight"] == (13, 18)
    attention = "model.layers.2.self_attn."
    assert llama[f"{attention}q_proj.weight"] == (24, 18) and llama[f"{attention}o_proj.weight"] == (18, 24)
    assert llama[f"{attention}k_proj.weight"] == llama[f"{attention}v_proj.weight"] == (8, 18)
    assert llama["model.layers.0.mlp.gate_proj.weight"] == (7, 18) == llama["model.layers.0.mlp.up_proj.weight"]
    assert llama["model.layers.0.mlp.down_proj.weight"] == (18, 7) and len(llama) == 3 + 3 * 9


def test_a_model_saved_without_its_head_has_no_prefix() -> None:
    assert find("transformer.h.0.ln_1.bias", {"h.0.ln_1.bias"}) == "h.0.ln_1.bias"
    assert find("transformer.wte.weight", {"transformer.wte.weight", "wte.weight"}) == "transformer.wte.weight"
    assert find("model.norm.weight", {"norm.weight"}) == "norm.weight"
    assert find("model.norm.weight", {"other"}) == "model.norm.weight"


def test_what_is_no_weight() -> None:
    for name in ("h.0.attn.bias", "transformer.h.10.attn.masked_bias", "model.layers.0.self_attn.rotary_emb.inv_freq"):
        assert not is_weight(name, GPT)
    assert not is_weight("lm_head.weight", GPT) and is_weight("lm_head.weight", LLAMA)
    for name in ("h.0.attn.c_attn.bias", "model.layers.0.self_attn.q_norm.weight", "score.weight"):
        assert is_weight(name, GPT)


@pytest.mark.parametrize(
    ("a", "key"),
    [
        (dataclasses.replace(GPT, experts=4, expert_ffn=5), "model.experts = 4"),
        (dataclasses.replace(LLAMA, experts=4, expert_ffn=5), "model.experts = 4"),
        (dataclasses.replace(GPT, bias=False), "model.bias = false"),
        (dataclasses.replace(GPT, kv_heads=1), "model.kv_heads = 1"),
        (dataclasses.replace(GPT, head_size=6), "model.head_size = 6"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_its_key(a: Architecture, key: str) -> None:
    with pytest.raises(InputError, match=key):
        list(tensors(a))


@every
def test_a_configuration_comes_back(a: Architecture) -> None:
    a = dataclasses.replace(a, norm_epsilon=1e-6, init_std=0.01, dropout=0.25 if a.style == "gpt" else 0.0)
    written = json.loads(json.dumps(to_config(a, "float32", 10)))
    assert written["torch_dtype"] == "float32" and written["eos_token_id"] == 10
    kept = from_config(written)
    assert {key: getattr(a, key) for key in kept} == kept
    missing = {"kv_heads", "head_size", "rope_theta"} if a.style == "gpt" else set()
    fixes = (
        "style layers hidden heads kv_heads head_size ffn vocabulary sequence tied bias norm_epsilon rope_theta".split()
    )
    assert set(fixes) - kept.keys() == missing  # which follow from the others


#: The files that come with the models of these names.
GPT2_SMALL = """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
"bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
"resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
"summary_use_proj": true, "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
"vocab_size": 50257}"""
LLAMA_2 = """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
"hidden_size": 8192, "initializer_range": 0.02, "intermediate_size": 28672, "max_position_embeddings": 4096,
"model_type": "llama", "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
"pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false,
"torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}"""


def test_published_configurations() -> None:
    gpt = from_config(json.loads(GPT2_SMALL))
    assert gpt == {
        **{"style": "gpt", "layers": 12, "hidden": 768, "heads": 12, "ffn": 3072, "vocabulary": 50257},
        **{"sequence": 1024, "dropout": 0.1, "tied": True, "bias": True, "norm_epsilon": 1e-5, "init_std": 0.02},
    }
    llama = from_config(json.loads(LLAMA_2))
    assert llama == {
        **{"style": "llama", "layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672},
        **{"vocabulary": 32000, "sequence": 4096, "tied": False, "bias": False, "norm_epsilon": 1e-5},
        **{"rope_theta": 10000.0, "init_std": 0.02},
    }
    newer = json.loads(LLAMA_2) | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}}
    assert from_config(newer)["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        (GPT2_SMALL, {"model_type": "mistral"}, "model_type = 'mistral'"),
        (GPT2_SMALL, {"model_type": ["gpt2"]}, "model_type"),
        (GPT2_SMALL, {"activation_function": "relu"}, "activation_function = 'relu'"),
        (GPT2_SMALL, {"scale_attn_weights": False}, "scale_attn_weights"),
        (GPT2_SMALL, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2_SMALL, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2_SMALL, {"attn_pdrop": 0.2}, "attn_pdrop"),
        (GPT2_SMALL, {"n_layer": "12"}, "n_layer = '12'"),
        (GPT2_SMALL, {"n_layer": True}, "n_layer"),
        (GPT2_SMALL, {"n_embd": 768.5}, "n_embd"),
        (GPT2_SMALL, {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        (GPT2_SMALL, {"layer_norm_epsilon": 10**400}, "layer_norm_epsilon"),
        (LLAMA_2, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA_2, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        (LLAMA_2, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_parameters"),
        (LLAMA_2, {"rope_parameters": [1]}, "rope_parameters"),
        (LLAMA_2, {"attention_bias": True}, "attention_bias and mlp_bias"),
        (LLAMA_2, {"num_key_value_heads": "8"}, "num_key_value_heads"),
        (LLAMA_2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_configurations_that_are_refused(base: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        from_config(json.loads(base) | change)
