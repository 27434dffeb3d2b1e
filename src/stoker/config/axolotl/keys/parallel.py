"""Keys of many GPUs."""

from stoker.config.axolotl import parallel, sharding, shared_rows
from stoker.config.axolotl.entries import becomes, custom, each
from stoker.config.axolotl.outcome import Entry
from stoker.config.axolotl.values import positive

KEYS: dict[str, Entry] = {
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
    **each("dp_shard_size dp_replicate_size", custom("honoured", "multiplies `train.batch_size`", parallel.data_size)),
    **each(
        "tensor_parallel_size expert_parallel_size",
        custom("no effect", parallel.ONE_DEVICE, parallel.split_size),
    ),
    **each(
        "context_parallel_size sequence_parallel_degree",
        custom("honoured", "`engine.context_parallel`", shared_rows.context_size),
    ),
    **each(
        "heads_k_stride ring_attn_func expert_parallel_backend expert_parallel_num_nvl_bytes "
        "expert_parallel_num_rdma_bytes expert_parallel_token_capacity expert_parallel_fallback_on_unsupported ddp "
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters world_size local_rank "
        "accelerator_config use_ray ray_run_name ray_num_workers resources_per_worker",
        custom("no effect", parallel.ONE_DEVICE, parallel.setting),
    ),
}
