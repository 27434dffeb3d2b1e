"""Keys of the model, its tokenizer and its number formats, and of where it runs."""

from stoker.config.axolotl import engine, model, parallel
from stoker.config.axolotl.entries import automatic, becomes, custom, each, no_effect, refused, unless_off
from stoker.config.axolotl.outcome import Entry
from stoker.config.axolotl.values import flag, text

_TOKENIZER = "the tokenizer's files say what it is"


def _role(role: str) -> Entry:
    return custom("honoured", f"`model.special_tokens.{role}`", model.special_token(role))


KEYS: dict[str, Entry] = {
    "base_model": becomes("model.base", text),
    **each("revision_of_model model_revision", becomes("model.revision", text)),
    "base_model_config": refused(
        "another repository's config.json is not read", "Put it into a copy of the model's folder."
    ),
    "cls_model_config": automatic("the architecture is read from the model's config.json", text),
    **each(
        "model_type type_of_model", custom("automatic", "the architecture is read from config.json", model.model_type)
    ),
    "tokenizer_config": becomes("model.tokenizer", text),
    **each("tokenizer_type tokenizer_use_fast tokenizer_legacy tokenizer_save_jinja_files", automatic(_TOKENIZER)),
    "tokenizer_use_mistral_common": refused(
        "mistral-common is not used",
        "Leave it out where the model has a tokenizer.json, or name one as tokenizer_config.",
    ),
    "trust_remote_code": custom(
        "no effect", "`model.trust_remote_code`, only where a commit is named as revision", model.remote_code
    ),
    "special_tokens.bos_token": _role("bos"),
    "special_tokens.eos_token": _role("eos"),
    "special_tokens.pad_token": _role("pad"),
    "special_tokens.unk_token": _role("unk"),
    **each(
        "special_tokens.additional_special_tokens tokens",
        custom("honoured", "`model.new_tokens`", model.new_tokens),
    ),
    "added_tokens_overrides": refused(
        "reserved tokens are not renamed", "Name new ones under tokens, or rename them in a copy of tokenizer.json."
    ),
    "resize_token_embeddings_to_32x": automatic(
        "the embedding grows by what is needed; no kernel needs a multiple of 32"
    ),
    "mean_resizing_embeddings": automatic("rows of new tokens start as the mean of the others"),
    "shrink_embeddings": refused("embeddings are not shrunk", "Leave it out: unused rows change nothing."),
    "embeddings_skip_upcast": automatic("a frozen embedding keeps the run's precision", flag),
    "fix_untrained_tokens": refused("rows of the embedding are not overwritten", "Train without an adapter."),
    "reinit_weights": refused("training does not start from random weights", "Name a folder with such weights."),
    **each("model_config overrides_of_model_config", custom("honoured", "`model.overrides`", model.overrides)),
    **each(
        "model_kwargs overrides_of_model_kwargs",
        refused("arguments of Transformers' loader are not passed on", "Remove it."),
    ),
    "rope_scaling": custom("honoured", "`model.overrides`", model.rope_scaling),
    "use_onebitllms": refused("ternary weights are not trained", "Use a model in bf16."),
    # Number formats, and where it runs.
    **each("bf16 fp16 bfloat16 float16 float32", custom("honoured", "`engine.precision`", engine.precision)),
    "fp8": unless_off("honoured", "`model.quantization: fp8` under an adapter; products are bf16 without", engine.fp8),
    **each(
        "fp8_config.recipe fp8_enable_fsdp_float8_all_gather", no_effect("only read with fp8; " + parallel.ONE_DEVICE)
    ),
    "tf32": becomes("engine.tf32", lambda value: value if value == "auto" else flag(value)),
    **each("fp32_norms fp32_norm_classes", automatic("norms are computed in fp32")),
    "device": automatic("the plan finds the device"),
    "device_map": automatic("the whole model is on one device"),
    "gpu_memory_limit": custom("honoured", "`engine.memory_limit_gib`", engine.memory),
    "max_memory": refused("limits for each device are not set", "Use gpu_memory_limit."),
    "low_cpu_mem_usage": automatic("weights stream from disk, one tensor at a time"),
    "experimental_skip_move_to_device": automatic("weights stream to the device, one tensor at a time"),
}
