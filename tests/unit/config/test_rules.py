import pytest

NARROW = ["adapter=null", "train.weight_dtype=bf16"]
MIXED = "data.train=[{path: a.jsonl, weight: 2.0}, {path: b.jsonl, weight: 1.0}]"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.epochs=1", "train.steps=5"], "train.epochs and train.steps are both set"),
        (["output.save_every_steps=5", "output.save_every_epochs=1"], "output.save_every_steps and"),
        (["train.schedule={warmup_steps: 5, warmup_ratio: 0.1}"], "warmup_ratio are both set"),
        (["train.steps=5", "train.schedule.warmup_steps=5"], "the whole run has only 5 steps"),
        (["train.schedule={kind: wsd, warmup_ratio: 0.5, decay_ratio: 0.6}"], "exceed 1"),
        (["engine.micro_batch_size=5"], "does not divide train.batch_size = 32. Use 4 or 8"),
        (["engine.micro_batch_size=64"], "does not divide train.batch_size = 32. Use 32"),
        (["train.evaluate_every_steps=5"], "train.evaluate_every_steps is set, but there are no validation rows"),
        (["train.early_stopping={patience: 2}"], "train.early_stopping is set, but"),
        (["task.kind=pretrain", "data.train_on=assistant"], "data.train_on has no effect: task pretrain learns"),
        (["task.kind=pretrain", "data.on_long=drop"], "data.on_long has no effect"),
        (["task.kind=pretrain", "data.train_on_end_of_turn=false"], "knows no turns"),
        (["task.kind=pretrain", "model.chat_template=chatml"], "model.chat_template has no effect"),
        (["task.kind=pretrain", "data.train.0.format=chat"], "data.train[0].format = chat"),
        (["data.on_long=split"], "data.on_long = split is for task pretrain"),
        (["data.train=[{path: a.jsonl, weight: 1.0}, {path: b.jsonl}]"], "data.train[1] has no weight"),
        (["data.train.0.shard={num: 3, index: 3}"], "shard.index = 3, but the parts are 0 to 2. Count from 0"),
        ([MIXED, "data.prepare=overlap", "train.steps=5"], "data.train[0].weight: data.prepare = overlap goes through"),
        (["data.validation=[{path: a.jsonl, weight: 1.0}]"], "data.validation[0].weight has no effect"),
        (["data.min_length=65", "data.sequence_length=64", "data.on_long=drop"], "leave no document"),
        (["data.streaming=true"], "data.streaming = true needs train.steps"),
        (["data.prepare=overlap"], "data.prepare = overlap needs train.steps"),
        (["data.streaming=true", "train.steps=5", "data.validation=0.1"], "no rows can be drawn from the data"),
        (["data.streaming=true", "train.steps=5", "data.deduplicate=true"], "data.deduplicate remembers every row"),
        (["data.streaming=true", "train.steps=5", "data.prepare=overlap"], "data.prepare = overlap has no meaning"),
        (["adapter.targets='(['"], "is not a regular expression"),
        (["engine.device=cpu", "engine.precision=fp16"], "needs a GPU"),
        (["adapter=null", "model.quantization=nf4"], "model.quantization = nf4 freezes the base"),
        (
            ["adapter.rank=8", "train.weight_dtype=bf16"],
            "is about the model's own weights, which an adapter leaves frozen",
        ),
        ([*NARROW, "train.optimizer={kind: sgd}"], "rounds stochastically, and sgd does not"),
        (["engine.strategy=ddp", "engine.fsdp2.offload=cpu"], "engine.fsdp2 has no effect: engine.strategy is ddp"),
        (["engine.num_processes=8", "engine.fsdp2.replicas=3"], "replicas = 3 does not divide engine.num_processes"),
        (["adapter.rank=8", "engine.fsdp2.param_dtype=bf16"], "param_dtype is about weights that are trained"),
        (["engine.fsdp2.offload=cpu", "engine.precision=fp16"], "engine.precision = fp16 scales the loss on the GPU"),
        ([*NARROW, "engine.precision=fp32"], "engine.precision = fp32, but with train.weight_dtype = bf16"),
        (["engine.device=cpu", "engine.offload_activations=true"], "offload_activations = true needs a CUDA GPU"),
    ],
)
def test_what_does_not_go_together_is_refused(complaints, overrides, words):
    (message,) = complaints(*overrides)
    assert words in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.steps=5", "train.schedule.warmup_steps=4"],
        ["engine.micro_batch_size=8"],
        ["data.validation=3", "train.evaluate_every_steps=5", "train.early_stopping={patience: 2}"],
        ["task.kind=pretrain", "data.train_on=all", "data.train.0.format=completion"],
        ["adapter.targets='.*(q|v)_proj'"],
        ["engine.device=cpu", "engine.precision=bf16"],
        [*NARROW, "engine.precision=bf16"],
        [*NARROW, "engine.strategy=fsdp2", "engine.num_processes=4", "engine.fsdp2.replicas=2"],
        ["data.train=[{path: 'https://x/y.jsonl', weight: 1.0, shard: {num: 2, index: 1}}]"],
        [MIXED, "data.streaming=true", "train.steps=5"],
        ["data.train.0.weight=2.0", "data.prepare=overlap", "train.steps=5"],
        ["data.min_length=65", "data.sequence_length=64"],
        ["data.streaming=true", "train.steps=5", "data.validation=[{path: 's3://bucket/x.jsonl'}]"],
    ],
)
def test_what_goes_together_is_accepted(parsed, overrides):
    assert parsed(*overrides).model.base == "builtin:tiny-llama"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("revision", ["main", COMMIT[:10]])
def test_remote_code_from_the_hub_needs_a_pinned_commit(complaints, revision):
    (message,) = complaints("model.base=a/b", "model.trust_remote_code=true", f"model.revision='{revision}'")
    assert "can be changed by others at any time" in message
    assert "40 hexadecimal digits" in message
    assert complaints("model.base=a/b", "model.trust_remote_code=true")


def test_remote_code_of_a_pinned_commit_or_of_a_folder_is_allowed(parsed, tmp_path):
    assert (
        parsed("model.base=a/b", "model.trust_remote_code=true", f"model.revision='{COMMIT}'").model.revision == COMMIT
    )
    assert parsed(f"model.base={tmp_path}", "model.trust_remote_code=true").model.trust_remote_code
