"""The one table: every key that Axolotl documents, reads or once read, and what becomes of it here.

Names are paths, with `[]` for the entries of a list; the three lists of datasets share their entries. A key whose value
is a free mapping (`deepspeed`, `lr_scheduler_kwargs`) has one entry, whose rule reads what is inside.
"""

from stoker.config.axolotl import adapter, datasets, model, optimizer, parallel, schedule, sharding, shared_rows
from stoker.config.axolotl.entries import (
    automatic,
    becomes,
    custom,
    honoured,
    in_source,
    no_effect,
    refused,
    unless_off,
)
from stoker.config.axolotl.outcome import Entry, Outcome, Reading
from stoker.config.axolotl.values import flag, number, positive, text, texts, whole

_INTERNAL = "for Axolotl's own use"
_KERNELS = "fused kernels of our own, wherever the plan finds them faster"
_ATTENTION = "the plan chooses how attention runs"
_ONE = parallel.ONE_DEVICE
_TOKENIZER = "the tokenizer's files say what it is"
_RL = "reinforcement learning and preference tasks are not in this version"
_SFT = "Use supervised rows, such as type: chat_template."
_IMAGES = "images and audio are not trained on in this version"
_TEXT_ONLY = "Use a text model with text rows, and remove the key."
_REWARD = "reward models are not trained in this version"
_SAMPLES = "samples are not written while training runs"
_QUESTIONS = "Use output.questions: they are asked at the end."
_WANDB = "Use wandb_project, use_mlflow or use_tensorboard."
_PACKING = "packing needs no tuning: best fit over all rows"


def _all(names: str, entry: Entry, prefix: str = "") -> dict[str, Entry]:
    """Returns one entry for each of several names."""
    return {f"{prefix}{name}": entry for name in names.split()}


def _role(role: str) -> Entry:
    return custom("honoured", f"`model.special_tokens.{role}`", model.special_token(role))


def _remote_code(reading: Reading) -> Outcome:
    revision = str(reading.other("revision_of_model") or reading.other("model_revision") or "")
    is_pinned = len(revision) == 40 and all(digit in "0123456789abcdef" for digit in revision)
    if flag(reading.value) and is_pinned:
        return honoured({("model", "trust_remote_code"): True})
    return Outcome("no effect", "code that comes with a model runs only where a commit (40 digits) is named")


def _resume(reading: Reading) -> Outcome:
    if flag_or_false(reading.value):
        return honoured({("output", "resume"): True})
    nearest = "Use auto_resume_from_checkpoints: true, or `stoker train --resume`; a tuned adapter is lora_model_dir."
    return Outcome("refused", f"checkpoints of other trainers are not read ({reading.value}). {nearest}")


def flag_or_false(value: object) -> bool:
    """Whether the value is a true flag; any other text is not."""
    return value is True or str(value).lower() in ("true", "yes", "on")


KEYS: dict[str, Entry] = {
    # The model and its tokenizer.
    "base_model": becomes("model.base", text),
    **_all("revision_of_model model_revision", becomes("model.revision", text)),
    "base_model_config": refused(
        "another repository's config.json is not read", "Put it into a copy of the model's folder."
    ),
    "cls_model_config": automatic("the architecture is read from the model's config.json", text),
    **_all(
        "model_type type_of_model", custom("automatic", "the architecture is read from config.json", model.model_type)
    ),
    "tokenizer_config": becomes("model.tokenizer", text),
    **_all("tokenizer_type tokenizer_use_fast tokenizer_legacy tokenizer_save_jinja_files", automatic(_TOKENIZER)),
    "tokenizer_use_mistral_common": refused(
        "mistral-common is not used",
        "Leave it out where the model has a tokenizer.json, or name one as tokenizer_config.",
    ),
    "trust_remote_code": custom(
        "no effect", "`model.trust_remote_code`, only where a commit is named as revision", _remote_code
    ),
    "special_tokens.bos_token": _role("bos"),
    "special_tokens.eos_token": _role("eos"),
    "special_tokens.pad_token": _role("pad"),
    "special_tokens.unk_token": _role("unk"),
    **_all(
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
    **_all("model_config overrides_of_model_config", custom("honoured", "`model.overrides`", model.overrides)),
    **_all(
        "model_kwargs overrides_of_model_kwargs",
        refused("arguments of Transformers' loader are not passed on", "Remove it."),
    ),
    "rope_scaling": custom("honoured", "`model.overrides`", model.rope_scaling),
    "use_onebitllms": refused("ternary weights are not trained", "Use a model in bf16."),
    # Precision and where it runs.
    **_all("bf16 fp16 bfloat16 float16 float32", custom("honoured", "`engine.precision`", model.precision)),
    "fp8": unless_off("honoured", "`model.quantization: fp8` under an adapter; products are bf16 without", model.fp8),
    **_all("fp8_config.recipe fp8_enable_fsdp_float8_all_gather", no_effect("only read with fp8; " + _ONE)),
    "tf32": becomes("engine.tf32", lambda value: value if value == "auto" else flag(value)),
    **_all("fp32_norms fp32_norm_classes", automatic("norms are computed in fp32")),
    "device": automatic("the plan finds the device"),
    "device_map": automatic("the whole model is on one device"),
    "gpu_memory_limit": custom("honoured", "`engine.memory_limit_gib`", model.memory),
    "max_memory": refused("limits for each device are not set", "Use gpu_memory_limit."),
    "low_cpu_mem_usage": automatic("weights stream from disk, one tensor at a time"),
    "experimental_skip_move_to_device": automatic("weights stream to the device, one tensor at a time"),
    # Rows.
    "pretraining_dataset": custom("honoured", "`data.train` with `task.kind: pretrain`", datasets.set_alone),
    "datasets[].path": custom("honoured", "`data.train[].path`", datasets.path),
    "datasets[].name": in_source("name", text),
    **_all("datasets[].split datasets[].train_on_split", custom("honoured", "`data.train[].split`", datasets.split)),
    "datasets[].data_files": custom("honoured", "`data.train[].data_files`", datasets.data_files),
    "datasets[].revision": in_source("revision", text),
    "datasets[].ds_type": custom("honoured", "`data.train[].file_type`", datasets.ds_type),
    **_all("datasets[].shards datasets[].shards_idx", custom("honoured", "`data.train[].shard`", datasets.shards)),
    "datasets[].preprocess_shards": automatic("memory stays flat in the number of rows", positive),
    "datasets[].trust_remote_code": no_effect("code that comes with a dataset is never run", flag),
    "datasets[].skip": custom("honoured", "`data.train[].split`, without the first rows", datasets.skip),
    "datasets[].type": custom("honoured", "`data.train[].format`", datasets.row_type),
    "datasets[].type.system_prompt": custom("honoured", "`data.train[].prompt.system`", datasets.prompt_system),
    "datasets[].type.system_format": datasets.in_prompt("prompt.system_format"),
    "datasets[].type.format": datasets.in_prompt("prompt.format"),
    "datasets[].type.no_input_format": datasets.in_prompt("prompt.no_input_format"),
    "datasets[].type.prompt_format": datasets.in_prompt("prompt.format"),
    **_all(
        "chosen_format rejected_format completion_format",
        datasets.in_prompt("prompt.output_format", datasets.output_format),
        "datasets[].type.",
    ),
    **{
        f"datasets[].type.field_{name}": datasets.in_prompt(f"fields.{name}")
        for name in ("system", "instruction", "input", "output", "prompt", "chosen", "rejected", "completion", "label")
    },
    "datasets[].type.field": datasets.in_prompt("fields.text"),
    **_all("datasets[].field datasets[].text_column", in_source("fields.text", text)),
    "datasets[].field_messages": custom("honoured", "`data.train[].fields.messages`", datasets.field_messages),
    **{
        f"datasets[].field_{name}": in_source(f"fields.{name}", text)
        for name in ("tools", "thinking", "system", "chosen", "rejected", "instruction", "input", "output")
    },
    "datasets[].template_thinking_key": custom(
        "automatic", "a thought is there under both usual keys", datasets.thinking_key
    ),
    "datasets[].message_property_mappings": custom(
        "honoured", "`data.train[].fields.role`, `.content`, `.thinking`, `.message_properties`", datasets.properties
    ),
    "datasets[].message_field_role": in_source("fields.role", text),
    "datasets[].message_field_content": in_source("fields.content", text),
    "datasets[].message_field_training": in_source("fields.train", text),
    "datasets[].message_field_training_detail": in_source("fields.train_detail", text),
    "datasets[].roles": in_source("chat.roles", datasets.roles),
    "datasets[].roles_to_train": in_source("chat.train_on", texts),
    "datasets[].train_on_eos": custom("honoured", "`data.train[].chat.train_on_end_of_turn`", datasets.train_on_eos),
    "datasets[].train_on_eot": in_source("chat.train_on_end_of_turn", datasets.end_of_turn),
    "datasets[].drop_system_message": in_source("chat.drop_system_message", flag),
    "datasets[].split_thinking": in_source("chat.split_thinking", flag),
    **_all(
        "datasets[].chat_template datasets[].chat_template_jinja",
        custom("honoured", "`data.train[].chat.chat_template`", datasets.chat_template),
    ),
    "datasets[].conversation": custom("honoured", "`data.train[].chat.chat_template`", datasets.conversation),
    **_all(
        "field_human field_model input_format input_transform",
        refused("it went with formats that are gone", "Use type: chat_template or a prompt of your own."),
        "datasets[].",
    ),
    **_all(
        "logprobs_field temperature",
        refused("distillation is not in this version", "Remove it to train on the rows."),
        "datasets[].",
    ),
    **_all(
        "step_separator max_completion_length train_on_last_step_only",
        refused(_REWARD, _SFT, follows="process_reward_model"),
        "datasets[].",
    ),
    **_all(
        "length sequence_length min_input_id max_input_id seed",
        refused("made-up rows are not made", "Use a file."),
        "datasets[].",
    ),
    "val_set_size": custom("honoured", "`data.validation`, a share or a count", datasets.validation),
    "sequence_len": becomes("data.sequence_length", positive),
    "eval_sequence_len": refused("rows to evaluate on have the same length", "Use sequence_len."),
    "sample_packing": becomes("data.packing", flag),
    "eval_sample_packing": automatic("as sample_packing; the validation loss is a mean over tokens either way", flag),
    **_all(
        "pad_to_sequence_len pad_to_multiple_of", automatic("rows are padded as the plan needs; padding is never seen")
    ),
    **_all(
        "sample_packing_group_size sample_packing_bin_size sample_packing_eff_est sample_packing_seq_len_multiplier "
        "sample_packing_mp_start_method sample_packing_sequentially multipack_real_batches batch_flattening "
        "pretrain_multipack_buffer_size streaming_multipack_buffer_size pretraining_sample_concatenation",
        automatic(_PACKING),
    ),
    "pretrain_multipack_attn": automatic("packed documents never see one another", flag),
    "max_packed_sequence_len": refused("Axolotl removed it", "Use sample_packing: true; rows are sequence_len long."),
    "excess_length_strategy": custom("honoured", "`data.on_long`", datasets.long_rows),
    "min_sample_len": becomes("data.min_length", positive),
    "max_prompt_len": refused(_RL, _SFT, follows="rl"),
    "train_on_inputs": custom("honoured", "`data.train_on: all`", datasets.train_on_inputs),
    "chat_template": datasets.for_conversations(custom("honoured", "`model.chat_template`", model.chat_template)),
    "chat_template_jinja": datasets.for_conversations(
        custom("honoured", "`model.chat_template`", model.chat_template_text)
    ),
    "chat_template_kwargs": datasets.for_conversations(
        custom("honoured", "`data.train[].chat.chat_template_kwargs`", datasets.template_arguments)
    ),
    "eot_tokens": datasets.for_conversations(becomes("data.end_of_turn_tokens", texts)),
    "default_system_message": datasets.for_conversations(
        custom("honoured", "`data.train[].chat.default_system_message`", datasets.default_system_message)
    ),
    **_all("shuffle_merged_datasets curriculum_sampling", custom("honoured", "`data.shuffle`", datasets.in_order)),
    "shuffle_before_merging_datasets": refused(
        "datasets are not shuffled one by one", "Leave it out: all rows are shuffled together."
    ),
    **_all("dataset_shard_num dataset_shard_idx", custom("honoured", "`data.train[].shard`", datasets.all_shards)),
    "dataset_exact_deduplication": becomes("data.deduplicate", flag),
    "dataset_prepared_path": becomes("data.cache_folder", text, note="a cache that does not fit is never used"),
    **_all("dataset_num_proc dataset_processes", becomes("data.num_workers", positive)),
    "dataset_keep_in_memory": automatic("memory stays flat in the number of rows", flag),
    "num_dataset_shards_to_save": automatic("prepared tokens are one file that is mapped, not read"),
    "skip_prepare_dataset": automatic("rows are prepared once and kept", flag),
    "streaming": custom("honoured", "`data.streaming`", datasets.streaming),
    "push_dataset_to_hub": refused("prepared rows are not uploaded", "Leave it out."),
    "hf_use_auth_token": automatic("the Hub's own login is used", flag),
    **_all(
        "dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor dataloader_drop_last",
        automatic("batches come from a mapped file; the last step of an epoch is a smaller one"),
    ),
    "remove_unused_columns": automatic("only the fields of the row's format are read", flag),
    "group_by_length": automatic("the rows of a step are sorted by length, so that little is padded", flag),
    # The adapter.
    "adapter": custom("honoured", "`adapter.kind`", adapter.adapter),
    **_all("load_in_4bit load_in_8bit", custom("honoured", "`model.quantization`: nf4, int8", adapter.quantization)),
    "bnb_config_kwargs": custom("automatic", "as QLoRA's NF4 is anyway", adapter.bitsandbytes),
    "model_quantization_config": custom("refused", "weights stored in MXFP4 or fp8 are not read", adapter.mxfp4),
    "model_quantization_config_kwargs": no_effect("only read with model_quantization_config"),
    **_all(
        "peft.loftq_config.loftq_bits",
        refused("LoftQ's start is not done", "Leave it out: adapters start at zero, as PEFT's do."),
    ),
    **_all("backend weight_dtype", custom("honoured", "`model.quantization`", adapter.quantization_config), "peft."),
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
    **_all(
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
    **_all(
        "gptq_groupsize gptq_model_v1 gptq_disable_exllama",
        refused("GPTQ weights are not read", "Name the model in full precision.", follows="gptq"),
    ),
    "merge_lora": no_effect("`stoker merge` does it, when training is over"),
    "merge_method": no_effect("`stoker merge` streams, one tensor at a time", text),
    "loraplus_lr_ratio": adapter.part("train.lora_plus_ratio", number),
    "loraplus_lr_embedding": no_effect("adapters here are on no embeddings", number),
    **_all(
        "relora relora_prune_ratio relora_prune_method relora_cpu_offload relora_steps relora_warmup_steps "
        "relora_anneal_steps",
        refused("ReLoRA is not done", "Use adapter: lora with a higher lora_r."),
    ),
    **_all("mora.use_mora mora.mora_type", refused("MoRA is not done", "Use adapter: lora.")),
    "quantize_moe_experts": automatic("experts are quantised with the other linear layers", flag),
    # How long and how fast.
    "num_epochs": custom("honoured", "`train.epochs`", schedule.length),
    "max_steps": custom("honoured", "`train.steps`, which wins over num_epochs", schedule.length),
    "micro_batch_size": custom("honoured", "`engine.micro_batch_size`", schedule.batch),
    "gradient_accumulation_steps": custom("honoured", "`train.batch_size` = micro-batch x steps", schedule.batch),
    "batch_size": custom("honoured", "`train.batch_size`", schedule.batch),
    "eval_batch_size": automatic("micro-batches to evaluate on are those of training; the loss is the same", positive),
    "auto_find_batch_size": automatic("a micro-batch that does not fit is split, with the same result", flag),
    "learning_rate": becomes("train.learning_rate", number),
    **_all(
        "embedding_lr embedding_lr_scale",
        custom("honoured", "`train.embedding_learning_rate`", optimizer.embedding_rate),
    ),
    "lr_groups[].name": refused("layers have no rates of their own", "Leave lr_groups out."),
    **_all("lr_groups[].modules lr_groups[].lr", refused("layers have no rates of their own", "Leave lr_groups out.")),
    "lr_scheduler": custom("honoured", "`train.schedule.kind`", schedule.schedule),
    "lr_scheduler_kwargs": custom("honoured", "`train.schedule`", schedule.scheduler_arguments),
    "lr_quadratic_warmup": refused("warm-up is a straight line", "Leave it out."),
    "cosine_min_lr_ratio": custom("honoured", "`train.schedule.floor`", schedule.cosine_floor),
    "cosine_constant_lr_ratio": custom("refused", "a floor before the end is not done", schedule.cosine_constant),
    "lr_div_factor": no_effect("Axolotl does not read it", number),
    "eta_min": no_effect("Axolotl does not read it; the floor is cosine_min_lr_ratio", number),
    **_all(
        "warmup_steps warmup_ratio",
        custom("honoured", "`train.schedule.warmup_steps`, `.warmup_ratio`", schedule.warmup),
    ),
    "optimizer": custom("honoured", "`train.optimizer.kind`", optimizer.optimizer),
    "optim_args": custom("refused", "arguments of an optimiser's own", optimizer.arguments),
    "optim_target_modules": refused("GaLore is not done", "Use adafactor or an adapter."),
    "weight_decay": custom("honoured", "`train.optimizer.weight_decay`", optimizer.weight_decay),
    **_all("adam_beta1 adam_beta2", custom("honoured", "`train.optimizer.betas`", optimizer.beta)),
    "adam_epsilon": custom("honoured", "`train.optimizer.epsilon`", optimizer.epsilon),
    "adam_eps": no_effect("Axolotl does not read it; it is adam_epsilon", number),
    **_all("adam_beta3 adam_epsilon2", no_effect("only CAME reads it", number)),
    "max_grad_norm": becomes("train.max_gradient_norm", lambda value: number(value) or None),
    **_all(
        "dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of",
        no_effect("only optimizer: dion reads it"),
    ),
    **_all(
        "qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits "
        "qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size",
        no_effect("only optimizer: q_galore_adamw8bit reads it"),
    ),
    **_all(
        "jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps",
        refused("the rate does not restart", "Leave it out."),
    ),
    **_all("lisa_n_layers lisa_step_interval lisa_layers_attribute", refused("LISA is not done", "Use an adapter.")),
    "torchdistx_path": no_effect("torch distx is not used: AdamW keeps its averages in fp32"),
    **_all("neftune_noise_alpha noisy_embedding_alpha", becomes("train.embedding_noise", number)),
    "unfrozen_parameters": custom("honoured", "`train.only`", adapter.unfrozen),
    "freeze_mm_modules": automatic("of a multimodal model only the language part is loaded", flag),
    "seed": becomes("train.seed", whole),
    "loss_watchdog_threshold": becomes("train.loss_limit.above", number),
    "loss_watchdog_patience": custom("honoured", "`train.loss_limit.patience`", schedule.watchdog_patience),
    # Evaluation, checkpoints, logs.
    **_all(
        "evals_per_epoch eval_steps eval_strategy evaluation_strategy",
        custom("honoured", "`train.evaluate_every_epochs`, `.evaluate_every_steps`", schedule.evaluation),
    ),
    **_all(
        "saves_per_epoch save_steps save_strategy",
        custom("honoured", "`output.save_every_epochs`, `.save_every_steps`", schedule.saving),
    ),
    "save_total_limit": becomes("output.keep_last", positive),
    "save_first_step": refused("the first step is not saved by itself", "Use save_steps."),
    "save_only_model": no_effect("a checkpoint always holds the optimiser, so that a run can go on", flag),
    "save_safetensors": automatic("weights are always safetensors", flag),
    "early_stopping_patience": custom("honoured", "`train.early_stopping.patience`", schedule.early_stopping),
    "load_best_model_at_end": automatic("the best checkpoint is kept; early stopping ends with it", flag),
    "metric_for_best_model": automatic("the validation loss decides", text),
    "greater_is_better": automatic("the validation loss decides", flag),
    "auto_resume_from_checkpoints": becomes("output.resume", flag),
    "resume_from_checkpoint": custom("refused", "checkpoints of other trainers are not read", _resume),
    **_all(
        "dynamic_checkpoint.enabled",
        refused("a file does not trigger a checkpoint", "Send SIGTERM: it saves and stops."),
    ),
    **_all(
        "check_interval trigger_file_path",
        no_effect("only read with dynamic_checkpoint.enabled"),
        "dynamic_checkpoint.",
    ),
    "output_dir": becomes("output.folder", text),
    "hub_model_id": becomes("output.hub_model_id", text),
    "hub_revision": becomes("output.hub_revision", text),
    "hub_strategy": no_effect("the tuned weights are uploaded once, at the end", text),
    "logging_steps": becomes("train.log_every_steps", lambda value: max(1, whole(value)) if number(value) >= 1 else 1),
    **_all(
        "include_tokens_per_second include_tkps",
        automatic("tokens per second are in every line of metrics.jsonl", flag),
    ),
    **_all("use_wandb use_mlflow use_tensorboard", custom("honoured", "`output.trackers`", model.trackers)),
    "wandb_project": custom("honoured", "`output.trackers: [wandb]`, `output.wandb.project`", model.wandb_project),
    **{
        f"wandb_{theirs}": custom("honoured", f"`output.wandb.{ours}`", model.wandb(ours))
        for theirs, ours in {"entity": "entity", "name": "name", "run_id": "run_id", "mode": "mode"}.items()
    },
    "wandb_watch": refused("gradients are not sent to Weights & Biases", "Leave it blank.", harmless=("false",)),
    "wandb_log_model": refused("weights are not sent to Weights & Biases", "Leave it blank.", harmless=("false",)),
    "mlflow_tracking_uri": refused("it is MLflow's own setting", "Set MLFLOW_TRACKING_URI.", follows="use_mlflow"),
    **_all(
        "mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts",
        refused("it is MLflow's own setting", "Set MLFLOW_EXPERIMENT_NAME.", follows="use_mlflow"),
    ),
    "use_comet": refused("Comet is not written to", _WANDB),
    **_all(
        "comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode comet_online "
        "comet_experiment_config",
        refused("Comet is not written to", _WANDB, follows="use_comet"),
    ),
    "use_trackio": refused("Trackio is not written to", _WANDB),
    **_all(
        "trackio_project_name trackio_run_name trackio_space_id",
        refused("Trackio is not written to", _WANDB, follows="use_trackio"),
    ),
    "use_swanlab": refused("SwanLab is not written to", _WANDB),
    **_all(
        "project experiment_name description mode workspace api_key log_model web_host api_host lark_webhook_url "
        "lark_secret log_completions completion_log_interval completion_max_buffer",
        refused("SwanLab is not written to", _WANDB, follows="use_swanlab"),
        "swanlab_",
    ),
    "use_otel_metrics": refused("OpenTelemetry is not written to", "Read metrics.jsonl."),
    **_all("otel_metrics_host otel_metrics_port", refused("no OpenTelemetry", _WANDB, follows="use_otel_metrics")),
    **_all("profiler_steps profiler_steps_start", refused("the profiler is not run", "Use `stoker bench`.")),
    **_all(
        "eval_table_size generate_samples num_generation_samples",
        refused(_SAMPLES, _QUESTIONS),
    ),
    "eval_max_new_tokens": refused(_SAMPLES, _QUESTIONS, follows="eval_table_size"),
    **_all(
        "max_new_tokens temperature top_p top_k prompt_ratio do_sample",
        refused(_SAMPLES, _QUESTIONS, follows="generate_samples"),
        "generation_",
    ),
    **_all(
        "do_causal_lm_eval do_bench_eval",
        refused("only the validation loss is measured", "Run such an evaluation on the folder that is saved."),
    ),
    "eval_causal_lm_metrics": refused(
        "only the validation loss is measured", "Remove it.", follows="do_causal_lm_eval"
    ),
    **_all("bench_dataset bench_split", refused("no benchmark is run", "Remove it.", follows="do_bench_eval")),
    **_all(
        "lm_eval_tasks lm_eval_batch_size lm_eval_post_train lm_eval_model",
        refused("tasks of lm-eval are not run after training", "Run lm_eval on the folder that is saved."),
    ),
    # What the engine does by itself.
    "gradient_checkpointing": custom("automatic", "the plan recomputes as far as memory demands", model.recompute),
    **_all(
        "use_reentrant preserve_rng_state determinism_check",
        automatic("recomputation is exact"),
        "gradient_checkpointing_kwargs.",
    ),
    "selective_checkpointing": automatic("the plan chooses layer by layer what is kept", flag),
    **_all(
        "save save_sliding_window recompute_layer_types offload",
        automatic("the plan chooses layer by layer what is kept"),
        "selective_checkpointing.",
    ),
    "activation_offloading": custom("automatic", "the plan offloads where memory demands it", model.offload),
    "layer_offloading": refused("layers' weights do not leave the GPU", "Use load_in_4bit with an adapter."),
    "ple_cpu_offload": refused("embeddings do not leave the GPU", "Remove it."),
    **{
        name: custom("automatic", f"`attn_implementation: {ours}`; the plan chooses", model.attention_flag(ours))
        for name, ours in model.ATTENTION_FLAGS.items()
    },
    "attn_implementation": custom("automatic", _ATTENTION, model.attention),
    **_all(
        "flex_attn_compile_kwargs gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 sdpa_varlen "
        "fused_attn_kernel flash_optimum",
        automatic(_ATTENTION),
    ),
    **_all(
        "flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_fuse_mlp "
        "unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope "
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel liger_rope liger_rms_norm "
        "liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation liger_cross_entropy "
        "liger_fused_linear_cross_entropy use_kernels use_scattermoe use_sonicmoe llama4_linearized_experts",
        automatic(_KERNELS, flag),
    ),
    **_all(
        "liger_kernel_impl experts_implementation expert_backend moe_grouped_backend moe_dequant_chunk_size "
        "moe_bnb_fast use_dsv4_kernels use_glm_dsa_kernels dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel "
        "dsv4_bf16_all",
        automatic(_KERNELS),
    ),
    **_all(
        "nonexpert_quantization dsv4_fp8_nonexpert_mode dsv4_fp4_grouped_mode gemma4_fp8_nonexpert "
        "gemma4_nf4_nonexpert nvfp4_merge_aware nvfp4_merge_aware_start_step",
        refused(
            "such formats of single layers are not done", "Use load_in_4bit or load_in_8bit.", harmless=("none", "bf16")
        ),
    ),
    "liger_use_token_scaling": refused("tokens are not weighted by their probability", "Leave it out."),
    **_all(
        "cut_cross_entropy chunked_cross_entropy chunked_cross_entropy_num_chunks",
        automatic("the loss is computed in chunks, over trained tokens only"),
    ),
    **_all(
        "tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp",
        automatic("long rows go through the feed-forward in tiles where that lowers the peak"),
    ),
    **_all(
        "torch_compile torch_compile_backend torch_compile_mode torch_compile_options deepcompile",
        automatic("kernels are fused by hand; nothing is compiled"),
    ),
    **_all("gc_steps gc_collect_steps torch_empty_cache_steps", automatic("memory is not fragmented: shapes repeat")),
    "plugins[]": custom("automatic", "by name: kernels and losses are automatic, others refused", model.plugin),
    # Many GPUs.
    "deepspeed": custom(
        "honoured",
        "`engine.strategy: deepspeed` and `engine.deepspeed.config`; by its name where the file is not there",
        parallel.deepspeed,
    ),
    "fsdp": custom("honoured", "`engine.strategy: fsdp2`, and its words in `engine.fsdp2`", sharding.words),
    "fsdp_version": custom("no effect", "`engine.strategy: fsdp2` is torch's second version", sharding.version),
    "fsdp_final_state_dict_type": custom(
        "automatic", "the tuned weights are one folder that Transformers or PEFT loads", sharding.member
    ),
    **{
        f"fsdp_config.{prefix}{name}": custom(kind, means, sharding.member)
        for names, kind, means in (
            ("offload_params", "honoured", "`engine.fsdp2.offload: cpu`"),
            ("reshard_after_forward sharding_strategy", "honoured", "`engine.fsdp2.reshard_after_forward`"),
            ("version use_orig_params limit_all_gathers", "no effect", "not of torch's second version"),
            ("mixed_precision_policy", "no effect", "`engine.precision` and `engine.fsdp2.param_dtype` say it"),
            (
                "activation_checkpointing sync_module_states cpu_ram_efficient_loading cpu_offload_pin_memory "
                "state_dict_type final_state_dict_type auto_wrap_policy transformer_layer_cls_to_wrap min_num_params "
                "backward_prefetch forward_prefetch forward_prefetch_limit",
                "automatic",
                "layers come from the model, weights are streamed into parts, and checkpoints written in them",
            ),
        )
        for name in names.split()
        for prefix in ("", "fsdp_")
    },
    "ddp_timeout": becomes("engine.hang_timeout", positive),
    **_all("dp_shard_size dp_replicate_size", custom("honoured", "multiplies `train.batch_size`", parallel.data_size)),
    **_all(
        "tensor_parallel_size expert_parallel_size",
        custom("no effect", _ONE, parallel.split_size),
    ),
    **_all(
        "context_parallel_size sequence_parallel_degree",
        custom("honoured", "`engine.context_parallel`", shared_rows.context_size),
    ),
    **_all(
        "heads_k_stride ring_attn_func expert_parallel_backend expert_parallel_num_nvl_bytes "
        "expert_parallel_num_rdma_bytes expert_parallel_token_capacity expert_parallel_fallback_on_unsupported ddp "
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters world_size local_rank "
        "accelerator_config use_ray ray_run_name ray_num_workers resources_per_worker",
        custom("no effect", _ONE, parallel.setting),
    ),
    # Tasks that are not in this version.
    "rl": custom(
        "refused",
        f"{_RL}. {_SFT}",
        lambda reading: Outcome("refused", f"{reading.value}: {_RL}. {_SFT}"),
    ),
    **_all(
        "rl_beta dpo_beta dpo_use_weighting dpo_label_smoothing dpo_use_liger_kernel dpo_padding_free dpo_loss_type "
        "dpo_loss_weights dpo_norm_loss dpo_use_logits_to_keep dpo_generate_during_eval precompute_ref_log_probs "
        "orpo_alpha rpo_alpha simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight",
        refused(_RL, _SFT, follows="rl"),
    ),
    **_all(
        "beta max_completion_length use_vllm vllm_mode vllm_device vllm_gpu_memory_utilization vllm_dtype "
        "vllm_max_model_len vllm_enable_prefix_caching vllm_server_host vllm_server_port vllm_server_timeout "
        "vllm_guided_decoding_regex reward_funcs reward_weights generation_batch_size num_generations log_completions "
        "num_completions_to_print importance_sampling_level sync_ref_model ref_model_mixup_alpha ref_model_sync_steps "
        "scale_rewards temperature top_p top_k min_p repetition_penalty generation_kwargs chat_template_kwargs "
        "num_iterations epsilon epsilon_high use_liger_loss loss_type mask_truncated_completions entropy_coef "
        "use_adaptive_entropy entropy_target entropy_coef_delta entropy_coef_min entropy_coef_max "
        "vllm_importance_sampling_clip_min vllm_importance_sampling_clip_max log_multimodal vllm_enable_sleep_mode "
        "rollout_func multi_objective_aggregation use_data_producer async_prefetch prefetch_depth vllm_sync_interval "
        "streaming_partial_batch streaming_min_groups vllm_importance_sampling_correction "
        "vllm_importance_sampling_mode vllm_importance_sampling_cap off_policy_mask_threshold use_bias_correction_kl "
        "reward_num_workers replay_buffer_size replay_recompute_logps reroll_start_fraction reroll_max_groups "
        "skip_zero_advantage_batches vllm_lora_sync",
        refused(_RL, _SFT, follows="rl"),
        "trl.",
    ),
    **_all(
        "device tensor_parallel_size data_parallel_size gpu_memory_utilization dtype max_model_len "
        "enable_prefix_caching host port enable_reasoning reasoning_parser enforce_eager serve_module "
        "worker_extension_cls",
        refused(_RL, _SFT, follows="rl"),
        "vllm.",
    ),
    **_all(
        "feature_layers embed_method use_whitening alignment_coef diversity_coef ce_coef adaptive_max_tokens "
        "gt_length_multiplier mode stride context_length generate_max_len n_samples_per_prompt temperature top_p "
        "rl_coef advantage_estimator min_completion_prefix",
        refused(_RL, _SFT, follows="rl"),
        "ebft.",
    ),
    **_all("reward_model process_reward_model", refused(_REWARD, _SFT)),
    **_all("center_rewards_coefficient num_labels", refused(_REWARD, _SFT, follows="reward_model")),
    **_all(
        "processor_type processor_kwargs processor_config is_multimodal image_size image_resize_algorithm",
        refused(_IMAGES, _TEXT_ONLY),
    ),
    **_all("role start end include_start include_end", refused(_IMAGES, _TEXT_ONLY), "role_boundaries[]."),
    **_all(
        "activation_dtype weight_dtype quantize_embedding group_size fake_quant_after_n_steps",
        refused("quantisation-aware training is not done", "Train in bf16 and quantise after."),
        "qat.",
    ),
    **_all(
        "weight_dtype activation_dtype quantize_embedding group_size",
        no_effect("only `axolotl quantize` reads it, not training"),
        "quantization.",
    ),
    **_all(
        "noise_schedule min_mask_ratio max_mask_ratio num_diffusion_steps eps importance_weighting mask_token_id "
        "mask_token_str generate_samples generation_interval num_generation_samples generation_steps "
        "generation_temperature generation_max_length",
        refused("diffusion language models are not trained", "Use a causal model."),
        "diffusion.",
    ),
    **_all("recipe save_compressed", refused("sparse fine-tuning is not done", "Remove it."), "llmcompressor."),
    **_all(
        "kd_trainer kd_ce_alpha kd_alpha kd_temperature kd_beta kd_normalize_topk kd_online_server_base_url "
        "kd_online_topk kd_online_server kd_online_timeout kd_temperature_min",
        refused("distillation is not done", "Remove it to train on the rows."),
    ),
    "dense_mixer": refused("DenseMixer's gradients for routers are not done", "Remove it."),
    **_all("grokfast_alpha grokfast_lamb", refused("Grokfast is not done", "Remove it.")),
    **_all(
        "spectrum_top_fraction spectrum_model_name",
        refused("Spectrum's choice of layers is not done", "Name them with unfrozen_parameters."),
    ),
    **_all("use_eaft eaft_alpha eaft_k", refused("tokens are not weighted by their entropy", "Leave it out.")),
    **_all(
        "scaling_softmax scaling_softmax_factor scaling_softmax_bias",
        refused("scaled softmax is not done", "Leave it out."),
    ),
    **_all(
        "use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks",
        refused("positions are not stretched (PoSE)", "Use a longer sequence_len."),
    ),
    **_all(
        "enabled dir auto_clone config_paths head_port server_timeout verify_timeout run_timeout datasets auto_start "
        "model_name multi_turn max_turns",
        refused(_RL, _SFT),
        "nemo_gym_",
    ),
    **_all(
        "backend base_url api_key project_id lora_rank train_attn train_mlp train_unembed loss_fn loss_fn_config "
        "pipeline max_sample_tokens sample_temperature num_samples reward_funcs save_steps save_name_prefix "
        "future_timeout",
        refused("training on a remote service is not done", "Remove the section."),
        "hatchery.",
    ),
    **_all("landmark_attention xpos_rope", refused("Axolotl removed it", "Remove it.")),
    **_all("log_sweep_min_lr log_sweep_max_lr", refused("rates are not swept", "Remove it.")),
    "load_4bit": refused("Axolotl removed it", "Use load_in_4bit: true with adapter: qlora."),
    "lora_out_dir": no_effect("Axolotl does not read it any more; it is output_dir"),
    "rl_adapter_ref_model": refused(_RL, _SFT, follows="rl"),
    "trainer_cls": refused("another trainer's class is not used", "Remove it."),
    # What is not about training.
    "strict": no_effect("unknown keys are always refused; --allow-unknown lets them through", flag),
    **_all(
        "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature",
        no_effect("`stoker chat` talks to the model in the terminal"),
    ),
    **_all("inference cloud cloud_config debug", no_effect("not about training")),
    "base_model_ignore_patterns": automatic("only safetensors are read"),
    "torch_dtype": no_effect("Axolotl sets it itself, from bf16 and fp16"),
    **_all(
        "is_preprocess preprocess_iterable total_num_tokens total_supervised_tokens axolotl_config_path "
        "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model",
        no_effect(_INTERNAL),
    ),
}
"""Every key's entry; `datasets[]` stands for all three lists of datasets."""

SECTIONS = {name.rpartition(".")[0] for name in KEYS if "." in name} | {
    name.removesuffix("[]") for name in KEYS if name.endswith("[]")
}
"""Keys whose members have entries of their own: they are no keys to be read themselves."""
