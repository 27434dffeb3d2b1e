"""Keys of what the engine does by itself: memory, attention, fused kernels."""

from stoker.config.axolotl import engine
from stoker.config.axolotl.entries import automatic, custom, each, refused
from stoker.config.axolotl.outcome import Entry
from stoker.config.axolotl.values import flag

_KERNELS = "fused kernels of our own, wherever the plan finds them faster"
_ATTENTION = "the plan chooses how attention runs"

KEYS: dict[str, Entry] = {
    "gradient_checkpointing": custom("automatic", "the plan recomputes as far as memory demands", engine.recompute),
    **each(
        "use_reentrant preserve_rng_state determinism_check",
        automatic("recomputation is exact"),
        "gradient_checkpointing_kwargs.",
    ),
    "selective_checkpointing": automatic("the plan chooses layer by layer what is kept", flag),
    **each(
        "save save_sliding_window recompute_layer_types offload",
        automatic("the plan chooses layer by layer what is kept"),
        "selective_checkpointing.",
    ),
    "activation_offloading": custom("automatic", "the plan offloads where memory demands it", engine.offload),
    "layer_offloading": refused("layers' weights do not leave the GPU", "Use load_in_4bit with an adapter."),
    "ple_cpu_offload": refused("embeddings do not leave the GPU", "Remove it."),
    **{
        name: custom("automatic", f"`attn_implementation: {ours}`; the plan chooses", engine.attention_flag(ours))
        for name, ours in engine.ATTENTION_FLAGS.items()
    },
    "attn_implementation": custom("automatic", _ATTENTION, engine.attention),
    **each(
        "flex_attn_compile_kwargs gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 sdpa_varlen "
        "fused_attn_kernel flash_optimum",
        automatic(_ATTENTION),
    ),
    **each(
        "flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_fuse_mlp "
        "unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope "
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel liger_rope liger_rms_norm "
        "liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation liger_cross_entropy "
        "liger_fused_linear_cross_entropy use_kernels use_scattermoe use_sonicmoe llama4_linearized_experts",
        automatic(_KERNELS, flag),
    ),
    **each(
        "liger_kernel_impl experts_implementation expert_backend moe_grouped_backend moe_dequant_chunk_size "
        "moe_bnb_fast use_dsv4_kernels use_glm_dsa_kernels dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel "
        "dsv4_bf16_all",
        automatic(_KERNELS),
    ),
    **each(
        "nonexpert_quantization dsv4_fp8_nonexpert_mode dsv4_fp4_grouped_mode gemma4_fp8_nonexpert "
        "gemma4_nf4_nonexpert nvfp4_merge_aware nvfp4_merge_aware_start_step",
        refused(
            "such formats of single layers are not done", "Use load_in_4bit or load_in_8bit.", harmless=("none", "bf16")
        ),
    ),
    "liger_use_token_scaling": refused("tokens are not weighted by their probability", "Leave it out."),
    **each(
        "cut_cross_entropy chunked_cross_entropy chunked_cross_entropy_num_chunks",
        automatic("the loss is computed in chunks, over trained tokens only"),
    ),
    **each(
        "tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp",
        automatic("long rows go through the feed-forward in tiles where that lowers the peak"),
    ),
    **each(
        "torch_compile torch_compile_backend torch_compile_mode torch_compile_options deepcompile",
        automatic("kernels are fused by hand; nothing is compiled"),
    ),
    **each("gc_steps gc_collect_steps torch_empty_cache_steps", automatic("memory is not fragmented: shapes repeat")),
    "plugins[]": custom("automatic", "by name: kernels and losses are automatic, others refused", engine.plugin),
}
