"""Keys of evaluation, checkpoints, logs and trackers."""

from stoker.config.axolotl import output, schedule
from stoker.config.axolotl.entries import automatic, becomes, custom, each, no_effect, refused
from stoker.config.axolotl.outcome import Entry
from stoker.config.axolotl.values import flag, number, positive, text, whole

_SAMPLES = "samples are not written while training runs"
_QUESTIONS = "Use output.questions: they are asked at the end."
_WANDB = "Use wandb_project, use_mlflow or use_tensorboard."

KEYS: dict[str, Entry] = {
    **each(
        "evals_per_epoch eval_steps eval_strategy evaluation_strategy",
        custom("honoured", "`train.evaluate_every_epochs`, `.evaluate_every_steps`", schedule.evaluation),
    ),
    **each(
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
    "resume_from_checkpoint": custom("refused", "checkpoints of other trainers are not read", output.resume),
    **each(
        "dynamic_checkpoint.enabled",
        refused("a file does not trigger a checkpoint", "Send SIGTERM: it saves and stops."),
    ),
    **each(
        "check_interval trigger_file_path",
        no_effect("only read with dynamic_checkpoint.enabled"),
        "dynamic_checkpoint.",
    ),
    "output_dir": becomes("output.folder", text),
    "hub_model_id": becomes("output.hub_model_id", text),
    "hub_revision": becomes("output.hub_revision", text),
    "hub_strategy": no_effect("the tuned weights are uploaded once, at the end", text),
    "logging_steps": becomes("train.log_every_steps", lambda value: max(1, whole(value)) if number(value) >= 1 else 1),
    **each(
        "include_tokens_per_second include_tkps",
        automatic("tokens per second are in every line of metrics.jsonl", flag),
    ),
    **each("use_wandb use_mlflow use_tensorboard", custom("honoured", "`output.trackers`", output.trackers)),
    "wandb_project": custom("honoured", "`output.trackers: [wandb]`, `output.wandb.project`", output.wandb_project),
    **{
        f"wandb_{theirs}": custom("honoured", f"`output.wandb.{ours}`", output.wandb(ours))
        for theirs, ours in {"entity": "entity", "name": "name", "run_id": "run_id", "mode": "mode"}.items()
    },
    "wandb_watch": refused("gradients are not sent to Weights & Biases", "Leave it blank.", harmless=("false",)),
    "wandb_log_model": refused("weights are not sent to Weights & Biases", "Leave it blank.", harmless=("false",)),
    "mlflow_tracking_uri": refused("it is MLflow's own setting", "Set MLFLOW_TRACKING_URI.", follows="use_mlflow"),
    **each(
        "mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts",
        refused("it is MLflow's own setting", "Set MLFLOW_EXPERIMENT_NAME.", follows="use_mlflow"),
    ),
    "use_comet": refused("Comet is not written to", _WANDB),
    **each(
        "comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode comet_online "
        "comet_experiment_config",
        refused("Comet is not written to", _WANDB, follows="use_comet"),
    ),
    "use_trackio": refused("Trackio is not written to", _WANDB),
    **each(
        "trackio_project_name trackio_run_name trackio_space_id",
        refused("Trackio is not written to", _WANDB, follows="use_trackio"),
    ),
    "use_swanlab": refused("SwanLab is not written to", _WANDB),
    **each(
        "project experiment_name description mode workspace api_key log_model web_host api_host lark_webhook_url "
        "lark_secret log_completions completion_log_interval completion_max_buffer",
        refused("SwanLab is not written to", _WANDB, follows="use_swanlab"),
        "swanlab_",
    ),
    "use_otel_metrics": refused("OpenTelemetry is not written to", "Read metrics.jsonl."),
    **each("otel_metrics_host otel_metrics_port", refused("no OpenTelemetry", _WANDB, follows="use_otel_metrics")),
    **each("profiler_steps profiler_steps_start", refused("the profiler is not run", "Use `stoker bench`.")),
    **each(
        "eval_table_size generate_samples num_generation_samples",
        refused(_SAMPLES, _QUESTIONS),
    ),
    "eval_max_new_tokens": refused(_SAMPLES, _QUESTIONS, follows="eval_table_size"),
    **each(
        "max_new_tokens temperature top_p top_k prompt_ratio do_sample",
        refused(_SAMPLES, _QUESTIONS, follows="generate_samples"),
        "generation_",
    ),
    **each(
        "do_causal_lm_eval do_bench_eval",
        refused("only the validation loss is measured", "Run such an evaluation on the folder that is saved."),
    ),
    "eval_causal_lm_metrics": refused(
        "only the validation loss is measured", "Remove it.", follows="do_causal_lm_eval"
    ),
    **each("bench_dataset bench_split", refused("no benchmark is run", "Remove it.", follows="do_bench_eval")),
    **each(
        "lm_eval_tasks lm_eval_batch_size lm_eval_post_train lm_eval_model",
        refused("tasks of lm-eval are not run after training", "Run lm_eval on the folder that is saved."),
    ),
}
