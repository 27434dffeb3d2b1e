"""What a user may ask for: nested, strict, frozen models; each field is documented beneath it, units in its name.

This is the authority on the YAML: `docs/configuration.md` is generated from it, error messages quote it, and unknown
keys are refused. What this version cannot do is not in it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

DEFAULT_KINDS = ("sft", "cosine", "adamw")
"""The kinds of task, schedule and optimiser that a section means when it does not name its kind."""

Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of the YAML: unknown keys refused, types never converted, values never changed after loading."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _by_kind(default: str) -> Discriminator:
    """Returns a discriminator on `kind`, which may be left out for the default kind."""

    def kind(value: Any) -> str:
        return str(value.get("kind", default)) if isinstance(value, dict) else getattr(value, "kind", str(value))

    return Discriminator(kind)


def _unless_set(values: Any, **defaults: Any) -> Any:
    """Returns the section with each default added whose key, and whose alternative in steps, are both left out."""
    if not isinstance(values, dict):
        return values
    steps = {name: name.replace("epochs", "steps") for name in defaults}
    missing = {
        name: defaults[name] for name in defaults if values.get(name) is None and values.get(steps[name]) is None
    }
    return values | missing


class SpecialTokens(Section):
    """Tokens with a role; the tokenizer's own unless set. One that it does not know is added to it."""

    bos: Text | None = None
    """Begins a text."""
    eos: Text | None = None
    """Ends a text, and most templates' turns."""
    pad: Text | None = None
    """Fills rows; it is never seen."""
    unk: Text | None = None
    """Stands for what the tokenizer does not know."""


class Model(Section):
    """The model to start from."""

    base: Text
    """Hub id (`meta-llama/Llama-3.2-1B`), local folder, or `builtin:tiny-llama` (made on the spot, no download)."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub repository; its main branch unless set."""
    trust_remote_code: bool = False
    """Run code that comes with the model, if neither Stoker nor Transformers has its class. Such code can do on this
    machine whatever you can: read it first, and for a Hub id set `revision` to the commit (40 digits) that you read."""
    overrides: dict[Text, Any] = {}
    """Changes to the model's config.json, of native models: `{output_router_logits: true}` learns a mixture's load
    balance too, `{rope_parameters: {...}}` scales positions. What is saved keeps them."""
    tokenizer: Text | None = None
    """Hub id or folder of another tokenizer; the model's own unless set."""
    chat_template: Text | None = None
    """A name in docs/data.md (`chatml`, `llama3`, ...), `tokenizer_default`, `tokenizer_default_fallback_chatml`, a
    Jinja file, or Jinja itself; the tokenizer's own unless set."""
    special_tokens: SpecialTokens = SpecialTokens()
    """Tokens with a role: `{pad: <|finetune_right_pad_id|>}`."""
    new_tokens: list[Text] = []
    """Tokens to add to the tokenizer: each is one token from here on, with a row of its own in the embedding."""
    quantization: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Format of the frozen base's linear layers under an adapter: `none` as stored, `nf4` 4.1 bits a weight, `int8` 8
    bits, `fp8` 8 bits and products in fp8 on GPUs that have them. A bitsandbytes 4-bit folder is NF4 by itself."""


class Adapter(Section):
    """A low-rank adapter that is trained while the base stays frozen. Leave the section out to train every weight."""

    kind: Literal["lora", "dora"] = "lora"
    """`lora`, or `dora`: LoRA with a trained magnitude for each output row."""
    rank: Count = 16
    """Inner size of the adapter's two matrices."""
    alpha: Positive = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: Ratio = 0.0
    """Share of the adapter's inputs dropped in training."""
    start_from: Text | None = None
    """Folder of an adapter in PEFT's format to go on from, instead of a new one; its settings must be those here."""
    targets: Text | Annotated[list[Text], Field(min_length=1)] = "all-linear"
    """`all-linear`, `all-dense` (not on a mixture's experts), a list of layer names such as `[q_proj, v_proj]`, or a
    regular expression for full names."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA), which keeps large ranks learning."""


EndOfTurn = Literal["turn", "all", "last", "none"]


class Fields(Section):
    """Your names of a format's fields, ours first: `{messages: dialogue}`. docs/data.md says which format has which."""

    messages: Text | None = None
    """The list of messages of a chat; `messages` or `conversations` unless set."""
    role: Text | None = None
    """Key of a message: who speaks; `role`, or `from` in ShareGPT rows, unless set."""
    content: Text | None = None
    """Key of a message: what is said; `content`, or `value` in ShareGPT rows, unless set."""
    thinking: Text | None = None
    """Key of a message: its reasoning; `reasoning_content`, `thinking` or `reasoning` unless set."""
    train: Text | None = None
    """Key of a message: whether it trains, true or false, over `train_on`; rows have none unless set."""
    train_detail: Text | None = None
    """Key of a message: which of its characters train, a list of `begin_offset`, `end_offset` (inclusive), `train`."""
    message_properties: dict[Text, Text] = {}
    """Further keys of a message that the chat template reads, the template's name first: `{name: author}`."""
    tools: Text | None = None
    """The tools that a chat may call, as a list or its JSON."""
    system: Text | None = None
    """A system message."""
    instruction: Text | None = None
    """What is asked."""
    input: Text | None = None
    """What the instruction is about."""
    output: Text | None = None
    """The answer."""
    text: Text | None = None
    """A text."""
    segments: Text | None = None
    """A list of `label` (whether it trains) and `text`."""
    input_ids: Text | None = None
    """Token ids."""
    attention_mask: Text | None = None
    """1 for a token, 0 for padding, which is left out."""
    labels: Text | None = None
    """Token ids to learn, -100 elsewhere; or whether each step of a stepwise row is right."""
    prompt: Text | None = None
    """What precedes a completion or a pair: a text or messages."""
    completion: Text | None = None
    """What follows the prompt: a text or messages."""
    label: Text | None = None
    """Whether the completion is desirable."""
    chosen: Text | None = None
    """The better answer: a text, a message or messages."""
    rejected: Text | None = None
    """The worse answer: a text, a message or messages."""
    completions: Text | None = None
    """The steps of a stepwise row: a list of texts."""


class Chat(Section):
    """How one source's conversations are read, rendered and trained; what is not set here holds as for all sources."""

    chat_template: Text | None = None
    """Chat template of these rows, as `model.chat_template` would name it."""
    chat_template_kwargs: dict[Text, Any] = {}
    """Further variables that the chat template reads: `{enable_thinking: false}`."""
    roles: dict[Text, list[Text]] = {}
    """Other names of roles, ours first: `{assistant: [narrator, bot]}`."""
    train_on: Literal["assistant", "all"] | list[Text] | None = None
    """Whose words are learned; `[]` leaves it to `fields.train`. `data.train_on` unless set."""
    last_turn_only: bool = False
    """Learn the last of the turns that would train, not those before it."""
    train_on_end_of_turn: EndOfTurn | None = None
    """Which turns' end token is learned; `data.train_on_end_of_turn` unless set."""
    train_on_eos: EndOfTurn | None = None
    """The same where the end token is the tokenizer's EOS; as `train_on_end_of_turn` unless set."""
    default_system_message: Text | None = None
    """System message of conversations that have none."""
    drop_system_message: bool = False
    """Leave out system messages."""
    split_thinking: bool = False
    """Give a thought that opens a content (`<think>...</think>`) to the template as `reasoning_content`."""


class PromptTexts(Section):
    """The text around the fields of formats `prompt`, `preference`, `unpaired`: `{system}`, `{instruction}`, ..."""

    format: Text | None = None
    """The prompt: `"User: {instruction} {input}\\nAssistant:"`; in preference rows `{prompt}` stands in it."""
    no_input_format: Text | None = None
    """The prompt of rows without `input`; `format` unless set."""
    system: str | None = None
    """System text of rows that bring none."""
    system_no_input: str | None = None
    """System text of rows that bring neither one nor `input`; `system` unless set."""
    system_format: str = "{system}"
    """How a system text is printed, before the prompt."""
    output_format: Text | None = None
    """The answer; as it is unless set. It trains."""


class Shard(Section):
    """One of several equal parts of a source's rows."""

    num: Count
    """How many parts there are."""
    index: CountOrZero
    """Which one to read, from 0: rows `index`, `index + num`, `index + 2 num`, and so on."""


class Source(Section):
    """One place that rows come from."""

    path: Text
    """File, folder, glob, Hub id, URL (`s3://`, `gs://`, `https://`), or `builtin:` rows; a relative path starts where
    the command is run. Files may be compressed (`.gz`, `.zst`)."""
    format: Text = "auto"
    """What a row holds, by a name in docs/data.md; `auto` looks at the first rows and reports what it found."""
    fields: Fields = Fields()
    """Other names for a format's fields, ours first: `{messages: dialogue}`."""
    chat: Chat = Chat()
    """How conversations of this source are read, rendered and trained."""
    prompt: PromptTexts = PromptTexts()
    """The text around the fields, for format `prompt` and preference rows."""
    file_type: Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "text"] | None = None
    """How to read the file; by its ending unless set."""
    split: Text = "train"
    """Split of a Hub dataset or folder, whole or a slice of it: `train[:20%]`, `train[1000:2000]`, `train[-10%:]`.
    Slices work on files too."""
    name: Text | None = None
    """Configuration (subset) of a Hub dataset."""
    limit: Count | None = None
    """Read only this many rows."""
    data_files: list[Text] = []
    """Files or patterns within the folder, URL or Hub dataset; all of it unless set."""
    revision: Text | None = None
    """Branch, tag or commit of a Hub dataset; its main branch unless set."""
    weight: Positive | None = None
    """Share of the training sequences that come from this source, relative to the others' weights. Set it for all
    sources or for none; without, every row comes once an epoch."""
    shard: Shard | None = None
    """Read one of several equal parts of the rows."""


def _validation_form(value: Any) -> str:
    forms = {float: "share", int: "count", list: "sources", tuple: "sources"}
    return forms.get(type(value), "neither")


Validation = Annotated[
    Annotated[Share, Tag("share")]
    | Annotated[Count, Tag("count")]
    | Annotated[list[Source], Field(min_length=1), Tag("sources")],
    Discriminator(_validation_form),
]


class Data(Section):
    """The rows to train on, and how they become tokens."""

    train: Annotated[list[Source], Field(min_length=1)]
    """List of sources, read one after the other."""
    validation: Validation | None = None
    """Rows held out to evaluate on: a share (`0.05`), a count (`200`), or a list of sources like `train`."""
    sequence_length: Annotated[int, Field(ge=8)] = 2048
    """Tokens of a training sequence at most."""
    packing: bool = True
    """Fill each sequence with whole documents, which never see one another."""
    train_on: Literal["assistant", "all"] | Annotated[list[Text], Field(min_length=1)] = "assistant"
    """Whose words are learned: `assistant`, `all`, or a list of roles. Task pretrain learns `all`."""
    train_on_end_of_turn: EndOfTurn | bool = "turn"
    """Which turns' end token is learned: of `turn`s that train (or `true`), of `all`, the `last` in the conversation,
    or `none` (or `false`), with which the model does not learn to stop."""
    end_of_turn_tokens: list[Text] = []
    """Tokens that end a turn; unless set, the first special token after it."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do with a row that cannot be read: `stop` naming file and line, or `skip` and count."""
    on_long: Literal["truncate", "drop", "stop", "split"] = "truncate"
    """What to do with a row longer than `sequence_length`; `split`, task pretrain's way, cuts text into pieces."""
    cache_folder: Text = "~/.cache/stoker"
    """Where prepared tokens are kept, by the content they come from."""
    shuffle: bool = True
    """Draw the order of sequences anew for each epoch; `false` takes rows in their order."""
    min_length: Count = 1
    """Leave out (and count) documents of fewer tokens."""
    deduplicate: bool = False
    """Take rows that are equal in every field once."""
    num_workers: Literal["auto"] | CountOrZero = "auto"
    """Processes that tokenise; 0 does it in the main one. `auto`: none for small data, else one for each core."""
    prepare: Literal["ahead", "overlap"] = "ahead"
    """`ahead` tokenises everything before the first step; `overlap` starts training while the rest is prepared: rows
    then come in windows, in their order, and `train.steps` says how long to train."""
    streaming: bool = False
    """Tokenise rows as they are needed and keep nothing, for data larger than memory and disk; needs `train.steps`."""
    window_sequences: Count = 256
    """With `streaming` or `prepare: overlap`: about how many sequences are packed and shuffled together."""


class Sft(Section):
    """Supervised fine-tuning: learn the turns that `data.train_on` names."""

    kind: Literal["sft"] = "sft"
    """The task."""


class Pretrain(Section):
    """Continued pre-training: learn every token of plain text; long texts are cut into pieces, none is lost."""

    kind: Literal["pretrain"] = "pretrain"
    """The task."""


class _Warmup(Section):
    warmup_steps: CountOrZero | None = None
    """Steps over which the rate rises from 0. Set this or `warmup_ratio`, not both."""
    warmup_ratio: Ratio | None = None
    """The same as a share of all steps."""


class Constant(_Warmup):
    """The rate stays where it is."""

    kind: Literal["constant"] = "constant"
    """The schedule."""


class Linear(_Warmup):
    """The rate falls in a straight line."""

    kind: Literal["linear"] = "linear"
    """The schedule."""
    floor: Fraction = 0.0
    """Share of `learning_rate` that is left at the last step."""


class Cosine(_Warmup):
    """The rate falls along half a cosine."""

    kind: Literal["cosine"] = "cosine"
    """The schedule."""
    floor: Fraction = 0.0
    """Share of `learning_rate` that is left at the last step."""


class WarmupStableDecay(_Warmup):
    """The rate stays, then falls in a straight line at the end."""

    kind: Literal["wsd"] = "wsd"
    """The schedule."""
    decay_ratio: Share = 0.1
    """Share of all steps over which the rate falls."""
    floor: Fraction = 0.0
    """Share of `learning_rate` that is left at the last step."""


class InverseSqrt(_Warmup):
    """The rate falls with the square root of the step."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    """The schedule."""


Schedule = Annotated[
    Annotated[Constant, Tag("constant")]
    | Annotated[Linear, Tag("linear")]
    | Annotated[Cosine, Tag("cosine")]
    | Annotated[WarmupStableDecay, Tag("wsd")]
    | Annotated[InverseSqrt, Tag("inverse_sqrt")],
    _by_kind(DEFAULT_KINDS[1]),
]


class _Optimizer(Section):
    weight_decay: NonNegative = 0.0
    """Pull towards zero at each step, times the rate; not on norms, biases and embeddings unless `decay_all`."""
    decay_all: bool = False
    """Let weight decay act on norms, biases and embeddings too."""


class AdamW(_Optimizer):
    """Adam with decoupled weight decay; fused where the device can."""

    kind: Literal["adamw"] = "adamw"
    """The optimiser."""
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """How slowly the two running averages forget: of the gradient, and of its square."""
    epsilon: Positive = 1e-8
    """Added to the denominator."""


class AdamW8bit(_Optimizer):
    """AdamW whose running averages take 8 bits a value, in weights of 4,096 values or more."""

    kind: Literal["adamw_8bit"] = "adamw_8bit"
    """The optimiser."""
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """How slowly the two running averages forget: of the gradient, and of its square."""
    epsilon: Positive = 1e-8
    """Added to the denominator."""


class Sgd(_Optimizer):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = "sgd"
    """The optimiser."""
    momentum: Beta = 0.0
    """How slowly the running average of the gradient forgets; 0 keeps none."""


class Adafactor(_Optimizer):
    """Adam with a factored second average, which takes next to no memory."""

    kind: Literal["adafactor"] = "adafactor"
    """The optimiser."""


class Muon(_Optimizer):
    """Momentum with orthogonal updates for the hidden matrices; AdamW for everything else."""

    kind: Literal["muon"] = "muon"
    """The optimiser."""
    momentum: Beta = 0.95
    """How slowly the matrices' running average of the gradient forgets."""
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's two averages, for everything else."""
    epsilon: Positive = 1e-8
    """Added to AdamW's denominator."""


Optimizer = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[AdamW8bit, Tag("adamw_8bit")]
    | Annotated[Sgd, Tag("sgd")]
    | Annotated[Adafactor, Tag("adafactor")]
    | Annotated[Muon, Tag("muon")],
    _by_kind(DEFAULT_KINDS[2]),
]

Task = Annotated[Annotated[Sft, Tag("sft")] | Annotated[Pretrain, Tag("pretrain")], _by_kind(DEFAULT_KINDS[0])]


class EarlyStopping(Section):
    """Stop when the validation loss no longer falls."""

    patience: Count
    """Evaluations without improvement after which training stops."""
    min_improvement: NonNegative = 0.0
    """How much lower the loss must be to count."""


class LossLimit(Section):
    """Stop a run that has broken down: its loss stays above a value."""

    above: Positive
    """The loss of a step that counts; about twice the loss at the start is a sign of a broken run."""
    patience: Count = 3
    """Steps above it in a row after which the run stops."""


class Train(Section):
    """How long and how fast to learn."""

    epochs: Positive | None = None
    """Passes over the training rows; 1 unless this or `steps` is set."""
    steps: Count | None = None
    """Optimiser steps, instead of epochs."""
    batch_size: Count = 32
    """Sequences of one optimiser step, over all devices; the plan splits it into micro-batches."""
    learning_rate: Positive
    """The highest rate of the schedule. 2e-4 suits most adapters, 2e-5 most full fine-tuning."""
    embedding_learning_rate: Positive | None = None
    """The same for the embedding and the head of a model whose every weight is trained; `learning_rate` unless set."""
    lora_plus_ratio: Positive | None = None
    """The rate of adapters' B over that of their A (LoRA+, arXiv:2402.12354, which finds 16 good); 1 unless set."""
    only: Annotated[list[Text], Field(min_length=1)] | None = None
    """Train only weights whose names one of these regular expressions matches, from the name's start. The names are
    those of the model's files: `model.layers.0.self_attn.q_proj.weight`. Every weight unless set."""
    weight_dtype: Literal["fp32", "bf16"] = "fp32"
    """What trained weights, their gradients and AdamW's averages are kept in, where every weight is trained. `bf16`
    takes half the memory, at `engine.precision` bf16; AdamW then rounds stochastically, so that small updates count."""
    embedding_noise: Positive | None = None
    """Noise on the embedding's output in training (NEFTune, arXiv:2310.05914, whose alpha this is: 5 to 15); none
    unless set."""
    schedule: Schedule = Cosine(warmup_ratio=0.03)
    """How the rate changes over the run."""
    optimizer: Optimizer = AdamW()
    """How gradients become updates."""
    max_gradient_norm: Positive | None = 1.0
    """Longer gradients are scaled down to this norm; `null` leaves them as they are."""
    seed: CountOrZero = 42
    """Fixes the order of rows, the adapter's start and dropout."""
    evaluate_every_steps: Count | None = None
    """Evaluate on the validation rows every so many steps."""
    evaluate_every_epochs: Positive | None = None
    """The same in epochs; 1 when there are validation rows, unless this or `evaluate_every_steps` is set."""
    early_stopping: EarlyStopping | None = None
    """When to stop before the end; never unless set."""
    loss_limit: LossLimit | None = None
    """When a high loss stops the run, as one that is not a number always does; never unless set."""
    log_every_steps: Count = 1
    """Steps between two lines of `metrics.jsonl`."""

    @model_validator(mode="before")
    @classmethod
    def _in_epochs_unless_in_steps(cls, values: Any) -> Any:
        return _unless_set(values, epochs=1.0)


class Fsdp2(Section):
    """How `engine.strategy: fsdp2` shares weights: the settings of torch's `fully_shard`."""

    reshard_after_forward: Literal["auto"] | bool = "auto"
    """Let a layer's weights go after its forward and gather them again for its backward. `false` sends a third less
    and holds the whole model from the forward on; `auto`: true."""
    replicas: Count = 1
    """Groups of processes, each of which holds the whole model in parts (hybrid sharding): as many as machines, so that
    weights are sent within a machine and gradients alone between machines."""
    offload: Literal["none", "cpu"] = "none"
    """`cpu`: parts of weights, gradients and optimiser states wait in host memory, where the optimiser steps."""
    param_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """In which trained weights are sent and used; `auto`: as they are kept. `bf16` halves what is sent of fp32 weights,
    and rounds norms' weights with the rest. For training every weight."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are summed over processes."""


class DeepSpeed(Section):
    """What `engine.strategy: deepspeed` shares, and what waits outside of the GPU."""

    stage: Literal["auto", 1, 2, 3] = "auto"
    """Of ZeRO: 1 shares the optimiser's state, 2 gradients too, 3 also weights. `auto`: that of `config`, or 2."""
    offload_optimizer: Literal["auto", "none", "cpu", "nvme"] = "auto"
    """Where the optimiser's state waits and steps: on the GPU (`none`), on the host, or, in stage 3, on an NVMe disk
    between steps. `auto`: as `config` has it, or `none`."""
    offload_parameters: Literal["auto", "none", "cpu", "nvme"] = "auto"
    """The same for the parts of weights, in stage 3."""
    nvme_path: Text | None = None
    """Folder on an NVMe disk, for what is offloaded there."""
    config: Text | dict[str, Any] | None = None
    """DeepSpeed's own JSON, as a path or written here; values left `auto` come from the plan, and what contradicts this
    YAML is refused. Optimiser, schedule, clipping and batch sizes are those of `train`."""


class Engine(Section):
    """How to run it. What is `auto` the plan decides, and says why."""

    strategy: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = "auto"
    """How work is spread over processes, one for each device: `single` is one of them; with `ddp` each holds the whole
    model, with `fsdp2` a part of every weight, with `deepspeed` (an extra) what its stage says. `auto`: `ddp` or
    `fsdp2` where there are several, never DeepSpeed."""
    num_processes: Count | None = None
    """Processes on this machine, one for each GPU; `--gpus` sets it. One unless set, or as many as an outer launcher
    (torchrun, Slurm, accelerate) has started."""
    context_parallel: Count = 1
    """Processes that share each row, for sequences too long for one GPU: each holds a part of a row's activations, and
    exchanges heads for attention. The rows of a step are dealt out to groups of so many."""
    fsdp2: Fsdp2 = Fsdp2()
    """Settings of `strategy: fsdp2`."""
    deepspeed: DeepSpeed = DeepSpeed()
    """Settings of `strategy: deepspeed`."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    micro_batch_size: Literal["auto"] | Count = "auto"
    """Sequences that go through the model at once; must divide `train.batch_size`."""
    recompute: Literal["auto", "none", "mixer", "attention", "input"] = "auto"
    """What a layer keeps for the backward, which computes the rest again: `none` keeps all; `mixer` what attention
    made, but not the wide feed-forward; `attention` its input and attention's output; `input` its input alone. `auto`
    keeps as much as fits, layer by layer."""
    offload_activations: Literal["auto"] | bool = "auto"
    """Let what layers keep wait in pinned host memory (CUDA only); `auto` when the GPU's memory demands it."""
    memory_limit_gib: Positive | None = None
    """Use at most so much of the device's memory, in GiB; all that is free unless set."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the matrix products; trained weights stay in `train.weight_dtype`."""
    kernels: Literal["auto", "reference", "triton"] = "auto"
    """Which implementation of each operation runs: `triton`, fused for CUDA GPUs, or `reference`, plain PyTorch."""
    tf32: bool = False
    """Let products of fp32 matrices round their factors to TF32 (10 bits) on GPUs that have it. Those of `precision`
    bf16 and fp16 are not affected."""
    cuda_graphs: Literal["auto"] | bool = "auto"
    """Replay micro-batches of one shape as one launch (CUDA only); `auto` where launching is what steps would wait for.
    Needs rows that are not packed, and no dropout."""
    num_threads: Literal["auto"] | Count = "auto"
    """CPU threads of PyTorch."""
    hang_timeout: Positive = 1800.0
    """Seconds that one of several processes may stand still while the others wait for it; then all end, and the message
    says which it is and what it was doing."""


class PlannedDevice(Section):
    """A device for `stoker plan`: what is not set is as in the catalogue under its name, or under that of `like`."""

    like: Text | None = None
    """A device of the catalogue to take the other figures from: `h100`."""
    name: Text | None = None
    """What it is called in tables."""
    memory_gib: Positive | None = None
    """Its memory in binary gigabytes, as cards of 24 or 80 have them."""
    memory_gb: Positive | None = None
    """The same in gigabytes of 10^9 bytes, as on some data sheets."""
    usable_gib: Positive | None = None
    """What is free of it when nothing runs; 98.5% of it unless set."""
    bandwidth: Positive | None = None
    """Of its memory, GB/s."""
    rates: dict[Literal["fp32", "tf32", "fp16", "bf16", "fp8"], Positive] | None = None
    """Dense matrix products by number format, TFLOP/s; a format that is not there is not computed in."""
    capability: Text | None = None
    """CUDA compute capability: `"9.0"`."""
    host_link: Positive | None = None
    """To the host's memory, one direction, GB/s."""
    nvlink: Positive | None = None
    """To its peers, both directions, GB/s."""
    network: Positive | None = None
    """Into a node of such devices, all adapters together, GB/s."""
    price: Positive | None = None
    """US dollars an hour for one."""
    source: Text | None = None
    """Where the figures are from."""


class Planning(Section):
    """What `stoker plan` should know besides the run."""

    devices: dict[Text, PlannedDevice] = {}
    """Your own devices and prices by name, which `--gpu` understands: `{mine: {like: h100, price: 1.99}}`."""


class WeightsAndBiases(Section):
    """Where a run is logged; what is not set, its own environment variables and defaults say."""

    project: Text | None = None
    """Project of the run."""
    entity: Text | None = None
    """User or team that owns it."""
    name: Text | None = None
    """Name of the run; that of `output.folder` unless set."""
    run_id: Text | None = None
    """Id of the run, to go on with one."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Whether it is sent."""


class Output(Section):
    """What a run leaves behind."""

    folder: Text
    """Folder of this run: configuration, plan, metrics, checkpoints, the tuned weights, report.html."""
    save_every_steps: Count | None = None
    """Write a checkpoint every so many steps."""
    save_every_epochs: Positive | None = None
    """The same in epochs; 1 unless this or `save_every_steps` is set. The end of the run is always saved."""
    keep_last: Count = 3
    """Checkpoints kept; older ones are removed."""
    save_in_background: Literal["auto"] | bool = "auto"
    """Let steps go on while a checkpoint is written from a copy in host memory; `auto`: where there is room for it."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss, when there are validation rows."""
    trackers: Literal["auto"] | list[Literal["tensorboard", "wandb", "mlflow"]] = "auto"
    """Where curves are sent besides `metrics.jsonl`; `auto`: TensorBoard when it is installed."""
    wandb: WeightsAndBiases = WeightsAndBiases()
    """Settings of the tracker `wandb`."""
    hub_model_id: Text | None = None
    """Repository of the Hub that the tuned weights are uploaded to at the end, made private where there is none."""
    hub_revision: Text | None = None
    """Branch of it; its main branch unless set."""
    resume: bool = False
    """Go on from the last checkpoint when `folder` holds a run, as `--resume` does; start where there is none."""
    questions: list[Text] = []
    """Asked of the tuned model at the end of the run, to hear how it sounds."""

    @model_validator(mode="before")
    @classmethod
    def _in_epochs_unless_in_steps(cls, values: Any) -> Any:
        return _unless_set(values, save_every_epochs=1.0)


class RunConfig(Section):
    """A run, whole: what `stoker train run.yaml` reads."""

    model: Model
    """The model to start from."""
    adapter: Adapter | None = None
    """A low-rank adapter to train; leave it out to train every weight."""
    data: Data
    """The rows to train on, and how they become tokens."""
    task: Task = Sft()
    """What is learned from the rows."""
    train: Train
    """How long and how fast to learn."""
    engine: Engine = Engine()
    """How to run it; the plan decides what is `auto`."""
    output: Output
    """What the run leaves behind."""
    plan: Planning = Planning()
    """Your own devices and prices, for `stoker plan`."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_depend_on_other_sections(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        task, data = values.get("task"), values.get("data")
        if isinstance(task, dict) and task.get("kind") == "pretrain" and isinstance(data, dict):
            values = values | {"data": {"train_on": "all", "on_long": "split"} | data}
        if isinstance(data, dict) and data.get("validation") is not None:
            values = values | {"train": _unless_set(values.get("train", {}), evaluate_every_epochs=1.0)}
        return values
