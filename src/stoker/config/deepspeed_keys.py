"""The keys of a DeepSpeed configuration (deepspeed.ai/docs/config-json), and what becomes of each here.

A test holds the tables to the fields of the installed package.
"""

from collections.abc import Mapping
from typing import Any

Kind = str
"""What a value may be besides "auto": "flag", "number", "text", "device", or "any" of DeepSpeed's own."""


def _all(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


_OFFLOAD = _all("device", "device") | _all("text", "nvme_path") | _all("flag", "pin_memory")
OFFLOAD_PARAM: Mapping[str, Kind] = _OFFLOAD | _all("number", "buffer_count buffer_size max_in_cpu")
OFFLOAD_OPTIMIZER: Mapping[str, Kind] = (
    _OFFLOAD | _all("number", "buffer_count") | _all("flag", "pipeline_read pipeline_write fast_init")
)
ZERO: Mapping[str, Any] = (
    _all("number", "stage reduce_bucket_size allgather_bucket_size sub_group_size")
    | _all("number", "stage3_prefetch_bucket_size stage3_param_persistence_threshold")
    | _all("number", "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance")
    | _all("flag", "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions")
    | _all("flag", "overlap_comm load_from_fp32_weights elastic_checkpoint ignore_unused_parameters")
    | _all("flag", "round_robin_gradients parameter_alignment memory_efficient_linear override_module_apply")
    | _all("flag", "log_trace_cache_warnings enable_sanity_checks stage3_gather_16bit_weights_on_model_save")
    | _all("flag", "stage3_gather_fp16_weights_on_model_save stage3_use_all_reduce_for_fetch_params")
    | _all("flag", "stage3_allgather_sequential")
    | {"offload_param": OFFLOAD_PARAM, "offload_optimizer": OFFLOAD_OPTIMIZER}
)

_FP16 = _all("flag", "enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads") | _all(
    "number", "loss_scale initial_scale_power loss_scale_window hysteresis min_loss_scale"
)
_BF16 = _all(
    "flag", "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
)
_AIO = _all("number", "block_size queue_depth intra_op_parallelism thread_count") | _all(
    "flag", "single_submit overlap_events use_gds"
)

TOP: Mapping[str, Any] = (
    _all("flag", "prescale_gradients wall_clock_breakdown memory_breakdown dump_state")
    | _all("flag", "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer")
    | _all("number", "gradient_predivide_factor steps_per_print train_batch_size train_micro_batch_size_per_gpu")
    | _all("number", "gradient_accumulation_steps gradient_clipping")
    | _all("text", "communication_data_type log_level")
    | _all("any", "optimizer scheduler comms_logger flops_profiler")
    | {"zero_optimization": ZERO, "fp16": _FP16, "bf16": _BF16, "aio": _AIO}
)
"""What is read; sections with their members."""

PASSED = (
    "aio",
    "comms_logger",
    "communication_data_type",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "wall_clock_breakdown",
)
"""Keys of the top level, besides zero_optimization, that go to DeepSpeed as they are."""

Refusal = tuple[str, str]
"""Why a key is refused, and what to do."""


def _refused(why: str, fix: str, names: str, *, within: str = "") -> dict[str, Refusal]:
    return dict.fromkeys((f"{within}{name}" for name in names.split()), (why, fix))


_ZERO = "zero_optimization."
REFUSED: Mapping[str, Refusal] = {
    **_refused("layers decide what they keep", "Remove it; engine.recompute says it.", "activation_checkpointing"),
    **_refused("products run in engine.precision", "Remove it.", "amp torch_autocast"),
    **_refused("gradients are added up in fp32", "Remove it.", "data_types"),
    **_refused(
        "the run is logged by its own trackers",
        "Remove it, and name them in output.trackers.",
        "tensorboard wandb csv_monitor comet",
    ),
    **_refused(
        "batches and their sizes are the run's own",
        "Remove it.",
        "data_efficiency curriculum_learning dataloader_drop_last elasticity autotuning managed_gradient_accumulation",
    ),
    **_refused(
        "checkpoints are the run's own", "Remove it.", "checkpoint nebula datastates_ckpt use_node_local_storage"
    ),
    **_refused("rows are shared by engine.context_parallel", "Remove it.", "sequence_parallel_size"),
    **_refused("the loss is divided by the tokens of all processes", "Remove it.", "gradient_allreduce_op"),
    **_refused(
        "what it is about is not part of a run here",
        "Remove it.",
        "compile compression_training disable_allgather disable_python_gc eigenvalue expert_parallel hybrid_engine "
        "pipeline progressive_layer_drop quantize_training seq_parallel_communication_data_type sparse_attention "
        "sparse_gradients tensor_parallel timers use_data_before_expert_parallelism weight_quantization",
    ),
    **_refused(
        "it is not done here",
        "Remove it.",
        "zenflow zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights "
        "zero_quantized_gradients mics_shard_size mics_hierarchical_params_gather save_muon_momentum_buffer_in_memory",
        within=_ZERO,
    ),
    **_refused(
        "what is gathered together are the model's own layers",
        "Remove it.",
        "leaf_module stage3_module_granularity_threshold",
        within=_ZERO,
    ),
    **_refused("DeepSpeed no longer does it", "Remove it.", "legacy_stage1", within=_ZERO),
    **_refused("it is deprecated", "Write offload_optimizer: {device: cpu}.", "cpu_offload", within=_ZERO),
    **_refused("it is deprecated", "Write offload_param: {device: cpu}.", "cpu_offload_param", within=_ZERO),
    **_refused(
        "it is deprecated", "Write pin_memory in offload_optimizer.", "cpu_offload_use_pin_memory", within=_ZERO
    ),
    **_refused("a step whose gradient is not finite is left out", "Remove it.", "compute_grad_norm", within=_ZERO),
    **_refused("checkpoints are the run's own", "Remove it.", "pipeline_loading_checkpoint", within=_ZERO),
    **_refused(
        "it needs DeepSpeed's own Adam",
        "Remove it.",
        "ratio super_offload cpuadam_cores_perc",
        within=f"{_ZERO}offload_optimizer.",
    ),
}
"""Keys that DeepSpeed knows and that are refused."""

HARMLESS: Mapping[str, Any] = {
    "compute_grad_norm": True,
    "ratio": 1.0,
    "super_offload": False,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "sparse_gradients": False,
    "legacy_stage1": False,
}
"""Values of refused keys that ask for nothing."""
