"""Tiny random checkpoints of classes that run through Transformers, and what their tests share."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 96
_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {"intermediate_size": 64, "num_key_value_heads": 2, **_SMALL}
_GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# An end token outside the vocabulary, as some defaults have it, makes embeddings fail; none is needed here.
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS = {
    "opt": {
        **_SMALL,
        "ffn_dim": 64,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
        "dropout": 0.0,
    },
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gptj": {**_GPT, **_NO_DROPOUT, "rotary_dim": 4},
    "codegen": {**_GPT, **_NO_DROPOUT, "rotary_dim": 4},
    "mpt": {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "persimmon": {"intermediate_size": 64, **_SMALL},
    "nemotron": {"head_dim": 8, **_GROUPED},
    "arcee": _GROUPED,
    "helium": {"head_dim": 8, **_GROUPED},
    "rwkv": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "attention_hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
    },
    "recurrent_gemma": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "lru_width": 32,
        "attention_window_size": 16,
        "num_key_value_heads": 1,
        "head_dim": 8,
    },
    "bitnet": _GROUPED,
    "gpt_bigcode": {**_GPT, **_NO_DROPOUT},
    "openai-gpt": {**_GPT, **_NO_DROPOUT},
    "xglm": {
        "vocab_size": VOCAB,
        "d_model": 32,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 64,
    },
    "apertus": _GROUPED,
    "seed_oss": {"head_dim": 8, **_GROUPED, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "ernie4_5": _GROUPED,
    "zamba2": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_d_state": 4,
        "n_mamba_heads": 8,
        "chunk_size": 16,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
        "max_position_embeddings": 64,
    },
    "hunyuan_v1_dense": {"head_dim": 8, **_GROUPED, "max_position_embeddings": 64},
    "vaultgemma": {"head_dim": 8, "sliding_window": 8, **_GROUPED},
}
"""Model type to a small configuration of it, without dropout."""


_KEPT = TemporaryDirectory(prefix="stoker-borrowed-")  # removed when the process ends


@cache
def folder_of(model_type):
    """Returns a folder that Transformers itself wrote, with weights large enough for attention to be uneven."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_TOKENS, **CONFIGS[model_type]})
    return save(AutoModelForCausalLM.from_config(config), Path(_KEPT.name) / model_type)


def save(model, folder):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases begin as ones and zeros, which would hide a mistake
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def theirs(folder, **options):
    """The plain model of Transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def ids_of(*shape, seed=1):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
