import re

import pytest

from stoker.config import describe
from stoker.config.axolotl import schedule
from stoker.config.axolotl.engine import ATTENTION_FLAGS
from stoker.config.axolotl.optimizer import NO_OPTIMIZERS, OPTIMIZERS
from stoker.config.axolotl.outcome import KINDS
from stoker.config.axolotl.table import KEYS, PARTS

OURS = {".".join(map(str, path)) for path, _ in describe.walk()}
# Axolotl's own optimisers beside those of Transformers (its documentation, "Optimizers").
AXOLOTLS = (
    "optimi_adamw ao_adamw_4bit ao_adamw_8bit ao_adamw_fp8 adopt_adamw adamc came_pytorch muon dion sinkgd "
    "polora flash_adamw flash_adam flash_sgd flash_sgdw flash_lion q_galore_adamw8bit"
)

# The keys that most public files hold.
THAT_MATTER = (
    "base_model output_dir sequence_len micro_batch_size learning_rate optimizer bf16 "
    "gradient_accumulation_steps lr_scheduler logging_steps num_epochs tf32 sample_packing warmup_ratio "
    "saves_per_epoch val_set_size attn_implementation gradient_checkpointing weight_decay wandb_name "
    "wandb_project wandb_entity wandb_watch wandb_log_model evals_per_epoch adapter lora_r lora_alpha "
    "dataset_prepared_path lora_dropout resume_from_checkpoint load_in_4bit load_in_8bit lora_model_dir "
    "lora_target_modules lora_target_linear model_type chat_template tokenizer_type eval_sample_packing strict "
    "pad_to_sequence_len trust_remote_code fp16 remove_unused_columns eot_tokens processor_type "
    "skip_prepare_dataset fsdp max_steps lora_mlp_kernel lora_qkv_kernel lora_o_kernel fsdp_version "
    "warmup_steps save_steps rl loss_watchdog_threshold loss_watchdog_patience use_kernels seed "
    "torchdistx_path deepspeed activation_offloading gptq ddp_find_unused_parameters "
    "tokenizer_use_mistral_common lora_modules_to_save adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "cosine_min_lr_ratio group_by_length train_on_inputs tokens unfrozen_parameters save_total_limit "
    "save_strategy early_stopping_patience auto_resume_from_checkpoints hub_model_id neftune_noise_alpha "
    "dataset_exact_deduplication shuffle_merged_datasets dataset_shard_num dataset_shard_idx "
    "excess_length_strategy min_sample_len embedding_lr loraplus_lr_ratio peft_use_rslora peft_use_dora "
    "lora_fan_in_fan_out torch_compile chat_template_jinja default_system_message"
)


@pytest.mark.slow  # these lists are their trainer's, which takes seconds to import
def test_every_optimizer_is_ours_or_refused_by_name(line):
    from transformers.training_args import OptimizerNames

    for name in [*(one.value for one in OptimizerNames), *AXOLOTLS.split()]:
        assert (name in OPTIMIZERS) != (name in NO_OPTIMIZERS), name
        found = line(optimizer=name)
        assert found.kind == ("honoured" if name in OPTIMIZERS else "refused"), name
        if found.kind == "refused":
            assert name in found.text
            assert "Use " in found.text, name


@pytest.mark.slow
def test_every_schedule_is_ours_or_refused_by_name(line):
    from transformers import SchedulerType

    for name in [*(one.value for one in SchedulerType), "one_cycle", "rex"]:
        found = line(lr_scheduler=name)
        assert found.kind == ("refused" if name in schedule.NO_SCHEDULES else "honoured"), name


def test_an_optimizer_that_nobody_knows_is_refused(problem):
    assert "adamw is no optimiser that Axolotl knows" in problem(optimizer="adamw")


@pytest.mark.parametrize("name", KEYS)
def test_every_entry_says_what_it_means(name):
    entry = KEYS[name]

    assert entry.kind in KINDS
    assert entry.means
    if entry.kind == "honoured":
        named = re.findall(r"`([a-z_]+\.[a-z0-9_.\[\]]+)", entry.means)
        assert all(one.replace("[]", "").rstrip(".") in OURS for one in named), named


def test_no_key_stands_in_two_parts_of_the_table():
    assert sum(len(part.KEYS) for part in PARTS) == len(KEYS)


def test_the_old_names_of_attention_are_in_the_table():
    assert set(ATTENTION_FLAGS) <= set(KEYS)


@pytest.mark.parametrize(
    "name",
    THAT_MATTER.split(),
)
def test_the_keys_that_matter_have_entries(name):
    assert name in KEYS
