# ruff: noqa: E501 - the templates stand as they were published
"""Small tokenizers trained on the spot, and the chat templates that the big models ship with."""

import functools
import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The furnace is hot. How hot is it? It is 900 degrees, said the user to the assistant.",
    "assistant user system human gpt Question: Answer: [INST] [/INST] <<SYS>> ### Response: model end of turn",
    "Naïve café, emoji 🙂🙂 und Straße, 中文 字符, мир. \n\n\n  spaces\t tabs   and more   spaces",
    '{"json": [1, 2, 3], "text": "quoted \\"words\\""} def f(x): return x + 1',
] * 4

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
]

# As published with the models (Llama 2 in its older form; Llama 3, Mistral 7B v0.1, ChatML as of Qwen 1.5, Zephyr,
# Gemma; Qwen 3 shortened to the parts that look into contents).
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}"
    "\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if message.role == 'user' and not (message.content.startswith('<tool_response>')) %}"
    "{%- set ns.last = index %}{%- break %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{%- set content = message.content %}{%- set thought = '' %}"
    "{%- if message.reasoning_content is defined %}{%- set thought = message.reasoning_content %}"
    "{%- elif '</think>' in message.content %}{%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- set thought = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and thought %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
)

# name -> template, BOS, EOS, whether it takes a system message, what ends an assistant's turn
TEMPLATES = {
    "llama2": (LLAMA2, "<s>", "</s>", True, "</s>"),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", True, "<|eot_id|>"),
    "mistral": (MISTRAL, "<s>", "</s>", False, "</s>"),
    "chatml": (CHATML, None, "<|im_end|>", True, "<|im_end|>"),
    "zephyr": (ZEPHYR, "<s>", "</s>", True, "</s>"),
    "gemma": (GEMMA, "<bos>", "<eos>", False, "<end_of_turn>"),
    "qwen3": (QWEN3, None, "<|im_end|>", True, "<|im_end|>"),
}


@functools.cache
def _trained(kind):
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=SPECIAL, initial_alphabet=alphabet)
    else:  # as SentencePiece models come: a marker for spaces, bytes for what the vocabulary lacks
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def build_tokenizer(template=None, *, bos="<s>", eos="</s>", kind="byte-level", add_bos=False):
    """Returns a fast tokenizer of about 500 tokens with that chat template."""
    state = json.loads(_trained(kind))
    for token in state["added_tokens"]:
        if token["content"].startswith("<0x"):
            token["special"] = False
    backend = Tokenizer.from_str(json.dumps(state))
    if add_bos:
        bos_id = backend.token_to_id(bos)
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def template_tokenizer(name, kind="byte-level"):
    template, bos, eos, _, _ = TEMPLATES[name]
    return build_tokenizer(template, bos=bos, eos=eos, kind=kind)


# The same templates with `{% generation %}` around what the assistant writes, end-of-turn marker included.
def _tagged(template, before, after):
    assert before in template
    return template.replace(before, after)


GENERATION = {
    "llama2": _tagged(
        LLAMA2,
        "{{ ' '  + content.strip() + ' ' + eos_token }}",
        "{{ ' ' }}{% generation %}{{ content.strip() + ' ' + eos_token }}{% endgeneration %}",
    ),
    "llama3": _tagged(
        LLAMA3,
        "{{ content }}",
        "{% if message['role'] == 'assistant' %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ content }}{% endif %}",
    ),
    "mistral": _tagged(
        MISTRAL,
        "{{ message['content'] + eos_token}}",
        "{% generation %}{{ message['content'] + eos_token}}{% endgeneration %}",
    ),
    "chatml": _tagged(
        CHATML,
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    ),
    "zephyr": _tagged(
        ZEPHYR,
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}",
        "{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}\n",
    ),
    "gemma": _tagged(
        GEMMA,
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}",
        "{{ '<start_of_turn>' + role + '\n' }}{% if role == 'model' %}{% generation %}"
        "{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endif %}",
    ),
}


@pytest.fixture
def chatml():
    """A byte-level tokenizer with the ChatML template."""
    return template_tokenizer("chatml")


@pytest.fixture(scope="session")
def make_tokenizer():
    """The builder itself: `make_tokenizer(template, bos=, eos=, kind=, add_bos=)`."""
    return build_tokenizer


@pytest.fixture
def template_case():
    """Name -> tokenizer with that published template, its twin with generation tags, and facts about it."""

    def case(name, kind="byte-level"):
        _, bos, eos, system, end = TEMPLATES[name]
        tagged = build_tokenizer(GENERATION.get(name), bos=bos, eos=eos, kind=kind)
        return template_tokenizer(name, kind), tagged, system, end

    return functools.cache(case)


@pytest.fixture
def trained_texts():
    """(tokenizer, ids, mask) -> the text of every run of trained tokens."""

    def texts(tokenizer, ids, trained):
        runs, current = [], []
        for token, flag in zip([*ids.tolist(), 0], [*trained.tolist(), False], strict=True):
            if flag:
                current.append(token)
            elif current:
                runs.append(tokenizer.decode(current))
                current = []
        return runs

    return texts
