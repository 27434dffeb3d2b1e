"""Keys of datasets, and of how rows become tokens."""

from stoker.config.axolotl import datasets, model
from stoker.config.axolotl.entries import automatic, becomes, custom, each, in_source, no_effect, refused
from stoker.config.axolotl.keys.unsupported import REWARD, RL, SFT
from stoker.config.axolotl.outcome import Entry
from stoker.config.axolotl.values import flag, positive, text, texts

_PACKING = "packing needs no tuning: best fit over all rows"

KEYS: dict[str, Entry] = {
    "pretraining_dataset": custom("honoured", "`data.train` with `task.kind: pretrain`", datasets.set_alone),
    "datasets[].path": custom("honoured", "`data.train[].path`", datasets.path),
    "datasets[].name": in_source("name", text),
    **each("datasets[].split datasets[].train_on_split", custom("honoured", "`data.train[].split`", datasets.split)),
    "datasets[].data_files": custom("honoured", "`data.train[].data_files`", datasets.data_files),
    "datasets[].revision": in_source("revision", text),
    "datasets[].ds_type": custom("honoured", "`data.train[].file_type`", datasets.ds_type),
    **each("datasets[].shards datasets[].shards_idx", custom("honoured", "`data.train[].shard`", datasets.shards)),
    "datasets[].preprocess_shards": automatic("memory stays flat in the number of rows", positive),
    "datasets[].trust_remote_code": no_effect("code that comes with a dataset is never run", flag),
    "datasets[].skip": custom("honoured", "`data.train[].split`, without the first rows", datasets.skip),
    "datasets[].type": custom("honoured", "`data.train[].format`", datasets.row_type),
    "datasets[].type.system_prompt": custom("honoured", "`data.train[].prompt.system`", datasets.prompt_system),
    "datasets[].type.system_format": datasets.in_prompt("prompt.system_format"),
    "datasets[].type.format": datasets.in_prompt("prompt.format"),
    "datasets[].type.no_input_format": datasets.in_prompt("prompt.no_input_format"),
    "datasets[].type.prompt_format": datasets.in_prompt("prompt.format"),
    **each(
        "chosen_format rejected_format completion_format",
        datasets.in_prompt("prompt.output_format", datasets.output_format),
        "datasets[].type.",
    ),
    **{
        f"datasets[].type.field_{name}": datasets.in_prompt(f"fields.{name}")
        for name in ("system", "instruction", "input", "output", "prompt", "chosen", "rejected", "completion", "label")
    },
    "datasets[].type.field": datasets.in_prompt("fields.text"),
    **each("datasets[].field datasets[].text_column", in_source("fields.text", text)),
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
    **each(
        "datasets[].chat_template datasets[].chat_template_jinja",
        custom("honoured", "`data.train[].chat.chat_template`", datasets.chat_template),
    ),
    "datasets[].conversation": custom("honoured", "`data.train[].chat.chat_template`", datasets.conversation),
    **each(
        "field_human field_model input_format input_transform",
        refused("it went with formats that are gone", "Use type: chat_template or a prompt of your own."),
        "datasets[].",
    ),
    **each(
        "logprobs_field temperature",
        refused("distillation is not in this version", "Remove it to train on the rows."),
        "datasets[].",
    ),
    **each(
        "step_separator max_completion_length train_on_last_step_only",
        refused(REWARD, SFT, follows="process_reward_model"),
        "datasets[].",
    ),
    **each(
        "length sequence_length min_input_id max_input_id seed",
        refused("made-up rows are not made", "Use a file."),
        "datasets[].",
    ),
    "val_set_size": custom("honoured", "`data.validation`, a share or a count", datasets.validation),
    "sequence_len": becomes("data.sequence_length", positive),
    "eval_sequence_len": refused("rows to evaluate on have the same length", "Use sequence_len."),
    "sample_packing": becomes("data.packing", flag),
    "eval_sample_packing": automatic("as sample_packing; the validation loss is a mean over tokens either way", flag),
    **each(
        "pad_to_sequence_len pad_to_multiple_of", automatic("rows are padded as the plan needs; padding is never seen")
    ),
    **each(
        "sample_packing_group_size sample_packing_bin_size sample_packing_eff_est sample_packing_seq_len_multiplier "
        "sample_packing_mp_start_method sample_packing_sequentially multipack_real_batches batch_flattening "
        "pretrain_multipack_buffer_size streaming_multipack_buffer_size pretraining_sample_concatenation",
        automatic(_PACKING),
    ),
    "pretrain_multipack_attn": automatic("packed documents never see one another", flag),
    "max_packed_sequence_len": refused("Axolotl removed it", "Use sample_packing: true; rows are sequence_len long."),
    "excess_length_strategy": custom("honoured", "`data.on_long`", datasets.long_rows),
    "min_sample_len": becomes("data.min_length", positive),
    "max_prompt_len": refused(RL, SFT, follows="rl"),
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
    **each("shuffle_merged_datasets curriculum_sampling", custom("honoured", "`data.shuffle`", datasets.in_order)),
    "shuffle_before_merging_datasets": refused(
        "datasets are not shuffled one by one", "Leave it out: all rows are shuffled together."
    ),
    **each("dataset_shard_num dataset_shard_idx", custom("honoured", "`data.train[].shard`", datasets.all_shards)),
    "dataset_exact_deduplication": becomes("data.deduplicate", flag),
    "dataset_prepared_path": becomes("data.cache_folder", text, note="a cache that does not fit is never used"),
    **each("dataset_num_proc dataset_processes", becomes("data.num_workers", positive)),
    "dataset_keep_in_memory": automatic("memory stays flat in the number of rows", flag),
    "num_dataset_shards_to_save": automatic("prepared tokens are one file that is mapped, not read"),
    "skip_prepare_dataset": automatic("rows are prepared once and kept", flag),
    "streaming": custom("honoured", "`data.streaming`", datasets.streaming),
    "push_dataset_to_hub": refused("prepared rows are not uploaded", "Leave it out."),
    "hf_use_auth_token": automatic("the Hub's own login is used", flag),
    **each(
        "dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor dataloader_drop_last",
        automatic("batches come from a mapped file; the last step of an epoch is a smaller one"),
    ),
    "remove_unused_columns": automatic("only the fields of the row's format are read", flag),
    "group_by_length": automatic("the rows of a step are sorted by length, so that little is padded", flag),
}
