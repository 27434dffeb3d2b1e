"""Keys of how long and how fast to learn."""

from stoker.config.axolotl import adapter, optimizer, schedule
from stoker.config.axolotl.entries import automatic, becomes, custom, each, no_effect, refused
from stoker.config.axolotl.outcome import Entry
from stoker.config.axolotl.values import flag, number, positive, whole

KEYS: dict[str, Entry] = {
    "num_epochs": custom("honoured", "`train.epochs`", schedule.length),
    "max_steps": custom("honoured", "`train.steps`, which wins over num_epochs", schedule.length),
    "micro_batch_size": custom("honoured", "`engine.micro_batch_size`", schedule.batch),
    "gradient_accumulation_steps": custom("honoured", "`train.batch_size` = micro-batch x steps", schedule.batch),
    "batch_size": custom("honoured", "`train.batch_size`", schedule.batch),
    "eval_batch_size": automatic("micro-batches to evaluate on are those of training; the loss is the same", positive),
    "auto_find_batch_size": automatic("a micro-batch that does not fit is split, with the same result", flag),
    "learning_rate": becomes("train.learning_rate", number),
    **each(
        "embedding_lr embedding_lr_scale",
        custom("honoured", "`train.embedding_learning_rate`", optimizer.embedding_rate),
    ),
    "lr_groups[].name": refused("layers have no rates of their own", "Leave lr_groups out."),
    **each("lr_groups[].modules lr_groups[].lr", refused("layers have no rates of their own", "Leave lr_groups out.")),
    "lr_scheduler": custom("honoured", "`train.schedule.kind`", schedule.schedule),
    "lr_scheduler_kwargs": custom("honoured", "`train.schedule`", schedule.scheduler_arguments),
    "lr_quadratic_warmup": refused("warm-up is a straight line", "Leave it out."),
    "cosine_min_lr_ratio": custom("honoured", "`train.schedule.floor`", schedule.cosine_floor),
    "cosine_constant_lr_ratio": custom("refused", "a floor before the end is not done", schedule.cosine_constant),
    "lr_div_factor": no_effect("Axolotl does not read it", number),
    "eta_min": no_effect("Axolotl does not read it; the floor is cosine_min_lr_ratio", number),
    **each(
        "warmup_steps warmup_ratio",
        custom("honoured", "`train.schedule.warmup_steps`, `.warmup_ratio`", schedule.warmup),
    ),
    "optimizer": custom("honoured", "`train.optimizer.kind`", optimizer.optimizer),
    "optim_args": custom("refused", "arguments of an optimiser's own", optimizer.arguments),
    "optim_target_modules": refused("GaLore is not done", "Use adafactor or an adapter."),
    "weight_decay": custom("honoured", "`train.optimizer.weight_decay`", optimizer.weight_decay),
    **each("adam_beta1 adam_beta2", custom("honoured", "`train.optimizer.betas`", optimizer.beta)),
    "adam_epsilon": custom("honoured", "`train.optimizer.epsilon`", optimizer.epsilon),
    "adam_eps": no_effect("Axolotl does not read it; it is adam_epsilon", number),
    **each("adam_beta3 adam_epsilon2", no_effect("only CAME reads it", number)),
    "max_grad_norm": becomes("train.max_gradient_norm", lambda value: number(value) or None),
    **each(
        "dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of",
        no_effect("only optimizer: dion reads it"),
    ),
    **each(
        "qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits "
        "qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size",
        no_effect("only optimizer: q_galore_adamw8bit reads it"),
    ),
    **each(
        "jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps",
        refused("the rate does not restart", "Leave it out."),
    ),
    **each("lisa_n_layers lisa_step_interval lisa_layers_attribute", refused("LISA is not done", "Use an adapter.")),
    "torchdistx_path": no_effect("torch distx is not used: AdamW keeps its averages in fp32"),
    **each("neftune_noise_alpha noisy_embedding_alpha", becomes("train.embedding_noise", number)),
    "unfrozen_parameters": custom("honoured", "`train.only`", adapter.unfrozen),
    "freeze_mm_modules": automatic("of a multimodal model only the language part is loaded", flag),
    "seed": becomes("train.seed", whole),
    "loss_watchdog_threshold": becomes("train.loss_limit.above", number),
    "loss_watchdog_patience": custom("honoured", "`train.loss_limit.patience`", schedule.watchdog_patience),
}
