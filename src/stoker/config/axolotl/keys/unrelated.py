"""Keys that are not about training."""

from stoker.config.axolotl.entries import automatic, each, no_effect
from stoker.config.axolotl.outcome import Entry
from stoker.config.axolotl.values import flag

_INTERNAL = "for Axolotl's own use"

KEYS: dict[str, Entry] = {
    "strict": no_effect("unknown keys are always refused; --allow-unknown lets them through", flag),
    **each(
        "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature",
        no_effect("`stoker chat` talks to the model in the terminal"),
    ),
    **each("inference cloud cloud_config debug", no_effect("not about training")),
    "base_model_ignore_patterns": automatic("only safetensors are read"),
    "torch_dtype": no_effect("Axolotl sets it itself, from bf16 and fp16"),
    **each(
        "is_preprocess preprocess_iterable total_num_tokens total_supervised_tokens axolotl_config_path "
        "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model",
        no_effect(_INTERNAL),
    ),
}
