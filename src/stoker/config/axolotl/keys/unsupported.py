"""Keys of tasks and methods that are not in this version."""

from stoker.config.axolotl.entries import custom, each, no_effect, refused
from stoker.config.axolotl.outcome import Entry, Outcome

RL = "reinforcement learning and preference tasks are not in this version"
SFT = "Use supervised rows, such as type: chat_template."
REWARD = "reward models are not trained in this version"
_IMAGES = "images and audio are not trained on in this version"
_TEXT_ONLY = "Use a text model with text rows, and remove the key."

KEYS: dict[str, Entry] = {
    "rl": custom(
        "refused",
        f"{RL}. {SFT}",
        lambda reading: Outcome("refused", f"{reading.value}: {RL}. {SFT}"),
    ),
    **each(
        "rl_beta dpo_beta dpo_use_weighting dpo_label_smoothing dpo_use_liger_kernel dpo_padding_free dpo_loss_type "
        "dpo_loss_weights dpo_norm_loss dpo_use_logits_to_keep dpo_generate_during_eval precompute_ref_log_probs "
        "orpo_alpha rpo_alpha simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight",
        refused(RL, SFT, follows="rl"),
    ),
    **each(
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
        refused(RL, SFT, follows="rl"),
        "trl.",
    ),
    **each(
        "device tensor_parallel_size data_parallel_size gpu_memory_utilization dtype max_model_len "
        "enable_prefix_caching host port enable_reasoning reasoning_parser enforce_eager serve_module "
        "worker_extension_cls",
        refused(RL, SFT, follows="rl"),
        "vllm.",
    ),
    **each(
        "feature_layers embed_method use_whitening alignment_coef diversity_coef ce_coef adaptive_max_tokens "
        "gt_length_multiplier mode stride context_length generate_max_len n_samples_per_prompt temperature top_p "
        "rl_coef advantage_estimator min_completion_prefix",
        refused(RL, SFT, follows="rl"),
        "ebft.",
    ),
    **each("reward_model process_reward_model", refused(REWARD, SFT)),
    **each("center_rewards_coefficient num_labels", refused(REWARD, SFT, follows="reward_model")),
    **each(
        "processor_type processor_kwargs processor_config is_multimodal image_size image_resize_algorithm",
        refused(_IMAGES, _TEXT_ONLY),
    ),
    **each("role start end include_start include_end", refused(_IMAGES, _TEXT_ONLY), "role_boundaries[]."),
    **each(
        "activation_dtype weight_dtype quantize_embedding group_size fake_quant_after_n_steps",
        refused("quantisation-aware training is not done", "Train in bf16 and quantise after."),
        "qat.",
    ),
    **each(
        "weight_dtype activation_dtype quantize_embedding group_size",
        no_effect("only `axolotl quantize` reads it, not training"),
        "quantization.",
    ),
    **each(
        "noise_schedule min_mask_ratio max_mask_ratio num_diffusion_steps eps importance_weighting mask_token_id "
        "mask_token_str generate_samples generation_interval num_generation_samples generation_steps "
        "generation_temperature generation_max_length",
        refused("diffusion language models are not trained", "Use a causal model."),
        "diffusion.",
    ),
    **each("recipe save_compressed", refused("sparse fine-tuning is not done", "Remove it."), "llmcompressor."),
    **each(
        "kd_trainer kd_ce_alpha kd_alpha kd_temperature kd_beta kd_normalize_topk kd_online_server_base_url "
        "kd_online_topk kd_online_server kd_online_timeout kd_temperature_min",
        refused("distillation is not done", "Remove it to train on the rows."),
    ),
    "dense_mixer": refused("DenseMixer's gradients for routers are not done", "Remove it."),
    **each("grokfast_alpha grokfast_lamb", refused("Grokfast is not done", "Remove it.")),
    **each(
        "spectrum_top_fraction spectrum_model_name",
        refused("Spectrum's choice of layers is not done", "Name them with unfrozen_parameters."),
    ),
    **each("use_eaft eaft_alpha eaft_k", refused("tokens are not weighted by their entropy", "Leave it out.")),
    **each(
        "scaling_softmax scaling_softmax_factor scaling_softmax_bias",
        refused("scaled softmax is not done", "Leave it out."),
    ),
    **each(
        "use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks",
        refused("positions are not stretched (PoSE)", "Use a longer sequence_len."),
    ),
    **each(
        "enabled dir auto_clone config_paths head_port server_timeout verify_timeout run_timeout datasets auto_start "
        "model_name multi_turn max_turns",
        refused(RL, SFT),
        "nemo_gym_",
    ),
    **each(
        "backend base_url api_key project_id lora_rank train_attn train_mlp train_unembed loss_fn loss_fn_config "
        "pipeline max_sample_tokens sample_temperature num_samples reward_funcs save_steps save_name_prefix "
        "future_timeout",
        refused("training on a remote service is not done", "Remove the section."),
        "hatchery.",
    ),
    **each("landmark_attention xpos_rope", refused("Axolotl removed it", "Remove it.")),
    **each("log_sweep_min_lr log_sweep_max_lr", refused("rates are not swept", "Remove it.")),
    "load_4bit": refused("Axolotl removed it", "Use load_in_4bit: true with adapter: qlora."),
    "lora_out_dir": no_effect("Axolotl does not read it any more; it is output_dir"),
    "rl_adapter_ref_model": refused(RL, SFT, follows="rl"),
    "trainer_cls": refused("another trainer's class is not used", "Remove it."),
}
