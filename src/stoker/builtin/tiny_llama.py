"""A Llama-shaped model and its tokenizer, made on the spot from a fixed seed: a real Hugging Face folder.

The model knows nothing: its weights are random numbers, and it is small enough to be fine-tuned on two CPU cores in
minutes. The weights have the size of a trained model's, not of a fresh one's: a frozen random base must carry signals
through every layer for an adapter to shape, and its frozen head must be able to be certain.

Everything follows from the shipped rows and the constants below, so the same version makes the same bytes on every
machine; the folder's name carries a hash of both.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.builtin.rows import rows_path
from stoker.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

_NAME = "tiny-llama"
_SEED = 20
_FORMAT = 1
"""Raised when the code below changes what it writes, so that folders made before are made again."""

_BEGIN, _END, _PAD = "<|begin|>", "<|end|>", "<|pad|>"
_SPECIAL_TOKENS = (_PAD, _BEGIN, _END, "<|system|>", "<|user|>", "<|assistant|>")
"""Their ids are 0 to 5."""

_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": _SPECIAL_TOKENS.index(_PAD),
    "bos_token_id": _SPECIAL_TOKENS.index(_BEGIN),
    "eos_token_id": _SPECIAL_TOKENS.index(_END),
    "initializer_range": 0.02,
    "use_cache": True,
    "dtype": "float32",
}

_TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": _BEGIN,
    "eos_token": _END,
    "pad_token": _PAD,
    "model_max_length": _CONFIG["max_position_embeddings"],
    "clean_up_tokenization_spaces": False,
    "chat_template": _CHAT_TEMPLATE,
}

_GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": _CONFIG["bos_token_id"],
    "eos_token_id": _CONFIG["eos_token_id"],
    "pad_token_id": _CONFIG["pad_token_id"],
    "do_sample": False,
}


def model_names() -> tuple[str, ...]:
    """The names of the models that can be made."""
    return (_NAME,)


def default_folder(name: str) -> Path:
    """Where the model `name` is kept: in the user's cache, under a hash of all that it follows from."""
    return Path.home() / ".cache" / "stoker" / "builtin" / f"{name}-{_content_key()}"


def materialize(name: str, folder: Path | None = None) -> Path:
    """Writes the model `name` to `folder` (by default `default_folder(name)`), unless it is there already.

    Written aside and renamed, so that a folder that exists is whole, also when two processes make it at once.

    Raises:
        ModelError: there is no such model, or the folder cannot be written.
    """
    if name != _NAME:
        raise ModelError(f"There is no built-in model {name!r}.", fix=f"Known: {', '.join(model_names())}.")
    folder = default_folder(name) if folder is None else folder
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(aside)
            _publish(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"The built-in model cannot be written to {folder}: {error.strerror or error}.",
            fix="Make room, or make the folder writable.",
        ) from error
    return folder


def _publish(aside: Path, folder: Path) -> None:
    """Renames the finished folder into place; another process may have been faster, and made the same."""
    aside.chmod(0o755)  # mkdtemp makes it private
    try:
        aside.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise


def _write(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(dict(_weights()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)
    _write_json(folder / "generation_config.json", _GENERATION_CONFIG)
    _write_json(folder / "config.json", _CONFIG)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _content_key() -> str:
    constants = json.dumps([_FORMAT, _SEED, _SPECIAL_TOKENS, _CONFIG, _TOKENIZER_CONFIG, _GENERATION_CONFIG])
    return hashlib.sha256(constants.encode() + rows_path("fine-tuning").read_bytes()).hexdigest()[:16]


def _weights() -> "Iterator[tuple[str, np.ndarray]]":
    """Each tensor by its Hugging Face name, fp32, drawn in a fixed order from one generator.

    A linear layer's weights have the standard deviation 1/sqrt(inputs), which keeps the size of what passes through;
    embeddings have 1. A head of 1/sqrt(hidden) gives logits of about 1 for anything, and up to sqrt(hidden) for a
    hidden state that points at a token: enough to be certain.
    """
    import numpy as np  # here, as all that only asks for a name would wait for it

    hidden, feed_forward, vocabulary = (_CONFIG[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    queries = _CONFIG["num_attention_heads"] * _CONFIG["head_dim"]
    keys = _CONFIG["num_key_value_heads"] * _CONFIG["head_dim"]
    generator = np.random.Generator(np.random.PCG64(_SEED))

    def normal(rows: int, columns: int, deviation: float) -> "np.ndarray":
        return generator.standard_normal((rows, columns), dtype=np.float32) * np.float32(deviation)

    def linear(outputs: int, inputs: int) -> "np.ndarray":
        return normal(outputs, inputs, 1 / math.sqrt(inputs))

    ones = np.ones(hidden, dtype=np.float32)
    yield "model.embed_tokens.weight", normal(vocabulary, hidden, 1.0)
    for layer in range(_CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", ones
        yield f"{at}.self_attn.q_proj.weight", linear(queries, hidden)
        yield f"{at}.self_attn.k_proj.weight", linear(keys, hidden)
        yield f"{at}.self_attn.v_proj.weight", linear(keys, hidden)
        yield f"{at}.self_attn.o_proj.weight", linear(hidden, queries)
        yield f"{at}.post_attention_layernorm.weight", ones
        yield f"{at}.mlp.gate_proj.weight", linear(feed_forward, hidden)
        yield f"{at}.mlp.up_proj.weight", linear(feed_forward, hidden)
        yield f"{at}.mlp.down_proj.weight", linear(hidden, feed_forward)
    yield "model.norm.weight", ones
    yield "lm_head.weight", linear(vocabulary, hidden)


def _tokenizer_json() -> str:
    """A byte-level byte-pair encoding learnt from the shipped training rows; every text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_CONFIG["vocab_size"],
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer.to_str(pretty=True)


def _texts() -> Iterator[str]:
    with rows_path("fine-tuning").open(encoding="utf-8") as lines:
        for line in lines:
            for message in json.loads(line)["messages"]:
                yield message["content"]
