"""Keys of the adapter, and of the base's number format under it."""

from stoker.config.axolotl import adapter
from stoker.config.axolotl.entries import automatic, custom, each, no_effect, refused, unless_off
from stoker.config.axolotl.outcome import Entry, Outcome
from stoker.config.axolotl.values import flag, number, text

KEYS: dict[str, Entry] = {
    "adapter": custom("honoured", "`adapter.kind`", adapter.adapter),
    **each("load_in_4bit load_in_8bit", custom("honoured", "`model.quantization`: nf4, int8", adapter.quantization)),
    "bnb_config_kwargs": custom("automatic", "as QLoRA's NF4 is anyway", adapter.bitsandbytes),
    "model_quantization_config": custom("refused", "weights stored in MXFP4 or fp8 are not read", adapter.mxfp4),
    "model_quantization_config_kwargs": no_effect("only read with model_quantization_config"),
    **each(
        "peft.loftq_config.loftq_bits",
        refused("LoftQ's start is not done", "Leave it out: adapters start at zero, as PEFT's do."),
    ),
    **each("backend weight_dtype", custom("honoured", "`model.quantization`", adapter.quantization_config), "peft."),
    "peft.group_size": no_effect("blocks of 64, as bitsandbytes' NF4"),
    "lora_r": adapter.part("adapter.rank", adapter.rank),
    "lora_alpha": adapter.part("adapter.alpha", number),
    "lora_dropout": adapter.part("adapter.dropout", number),
    "lora_target_modules": custom("honoured", "`adapter.targets`", adapter.with_adapter(adapter.targets)),
    "lora_target_linear": custom(
        "honoured", "`adapter.targets: all-dense`", adapter.with_adapter(adapter.linear_targets)
    ),
    "lora_target_parameters": custom(
        "honoured", "`adapter.targets`, with experts", adapter.with_adapter(adapter.parameters)
    ),
    "lora_modules_to_save": refused(
        "embeddings and heads are not trained beside an adapter", "Leave it out, or train without an adapter."
    ),
    "lora_fan_in_fan_out": automatic("how weights are stored is read from the architecture", flag),
    "lora_model_dir": adapter.part("adapter.start_from", text),
    "lora_exclude_modules": refused(
        "names are not taken out of all-linear", "Name the targets as lora_target_modules."
    ),
    **each(
        "lora_rank_pattern lora_alpha_pattern",
        refused("ranks of single layers are not done", "Use one lora_r for all."),
    ),
    "peft_use_dora": unless_off("honoured", "`adapter.kind: dora`", adapter.with_adapter(adapter.dora)),
    "peft_use_rslora": adapter.part("adapter.rank_stabilized", flag),
    "peft_layers_to_transform": custom(
        "honoured", "`adapter.targets`, a regular expression with the layers", adapter.with_adapter(adapter.layers)
    ),
    "peft_layers_pattern": custom(
        "honoured",
        "`adapter.targets`, see peft_layers_to_transform",
        adapter.with_adapter(lambda reading: Outcome("honoured", "part of adapter.targets")),
    ),
    "peft_init_lora_weights": custom("automatic", "A uniform, B zero, as PEFT's default", adapter.start),
    "peft_layer_replication": refused("layers are not repeated", "Remove it."),
    "peft_trainable_token_indices": refused("single rows of the embedding are not trained", "Remove it."),
    "peft_ensure_weight_tying": automatic("tied weights stay tied", flag),
    "peft_autocast_adapter_dtype": automatic("adapters are fp32", flag),
    "lora_on_cpu": automatic("adapters are small: they are made where they train", flag),
    "qlora_sharded_model_loading": automatic("weights are quantised one by one as they stream in", flag),
    "gptq": refused("GPTQ weights are not read", "Name the model in full precision, with load_in_4bit: true."),
    **each(
        "gptq_groupsize gptq_model_v1 gptq_disable_exllama",
        refused("GPTQ weights are not read", "Name the model in full precision.", follows="gptq"),
    ),
    "merge_lora": no_effect("`stoker merge` does it, when training is over"),
    "merge_method": no_effect("`stoker merge` streams, one tensor at a time", text),
    "loraplus_lr_ratio": adapter.part("train.lora_plus_ratio", number),
    "loraplus_lr_embedding": no_effect("adapters here are on no embeddings", number),
    **each(
        "relora relora_prune_ratio relora_prune_method relora_cpu_offload relora_steps relora_warmup_steps "
        "relora_anneal_steps",
        refused("ReLoRA is not done", "Use adapter: lora with a higher lora_r."),
    ),
    **each("mora.use_mora mora.mora_type", refused("MoRA is not done", "Use adapter: lora.")),
    "quantize_moe_experts": automatic("experts are quantised with the other linear layers", flag),
}
