"""What every native family is held to: the same numbers as Transformers' own class on the same random weights.

    CASES = {"qwen3": Qwen3Config(**SIZES), ...}

    @pytest.mark.parametrize(("name", "check"), every_check(CASES))
    def test_family(name, check):
        CHECKS[check](pair(CASES[name]))

`pair` makes (once for each configuration) the checkpoint, Transformers' model and ours; a check never changes them.
Configurations are tiny: two or three layers, hidden size 32 to 64, a vocabulary of about 100.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from stoker.adapters import fused_block, lora
from stoker.adapters.fused_block import fuse_blocks
from stoker.arch import arithmetic, families
from stoker.arch.shape import why_not_llama
from stoker.arch.spec import ArchSpec
from stoker.data.batch import Batch
from stoker.errors import ModelError
from stoker.export import adapter
from stoker.export.merged import merge
from stoker.models import native
from stoker.models.folder import read_config
from stoker.nn.decoder import Decoder
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.linear import FusedLinear
from stoker.nn.moe import ExpertLinear, FrozenExpertLinear
from stoker.tasks.supervised import SupervisedTask

TOLERANCE = 1e-5
"""Both sides are fp32 and sum in different orders; logits are of order 1, where fp32 resolves 1e-7."""
FIRST_ID = 5
"""Ids below are special tokens in some configurations; Transformers gives the padding token's embedding no gradient."""


@dataclass(frozen=True)
class Pair:
    """Transformers' model, ours, and the folder that both were loaded from; `tolerance` of logits of order 1."""

    theirs: Any
    ours: Decoder
    spec: ArchSpec
    folder: Path
    tolerance: float

    def tokens(self, *shape: int, seed: int = 1) -> Tensor:
        """Random ids, the same in every run."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(FIRST_ID, self.spec.vocab_size, shape, generator=generator)

    def fresh(self, **options: Any) -> Decoder:
        """Our model loaded again, to be changed at will."""
        return native.load(self.folder, self.spec, **options).eval()


def pair(config: PretrainedConfig, *, tolerance: float = TOLERANCE) -> Pair:
    """The pair of a configuration, made once a session."""
    return _pair(_Key(config), tolerance)


class _Key:
    """A configuration, equal to others that say the same."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.said = config.to_json_string()

    def __hash__(self) -> int:
        return hash(self.said)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.said == other.said


@lru_cache(maxsize=8)
def _pair(key: _Key, tolerance: float) -> Pair:
    folder = Path(tempfile.mkdtemp(prefix="parity-"))
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(copy.deepcopy(key.config), attn_implementation="eager").eval()
    with torch.no_grad():
        # Norms of one and biases of zero would hide a mistake in either.
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(folder)
    spec = families.read(read_config(folder), str(folder))
    return Pair(theirs, native.load(folder, spec).eval(), spec, folder, tolerance)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compares logits, relative to the largest where that is above one."""
    largest = theirs.abs().max().item()
    assert largest > 0.02, "logits this small would hide a difference"
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, largest)


@torch.no_grad()
def check_logits(pair: Pair) -> None:
    """The same logits for whole rows."""
    ids = pair.tokens(2, 40)
    assert_close(pair.ours.logits(pair.ours(ids)), pair.theirs(ids, use_cache=False).logits, pair.tolerance)


def check_gradients(pair: Pair) -> None:
    """The same gradient of every parameter, by its Hugging Face name."""
    ids = pair.tokens(2, 24)
    ours, theirs = copy.deepcopy(pair.ours), pair.theirs
    theirs.zero_grad()
    for logits in (theirs(ids, use_cache=False).logits, ours.logits(ours(ids))):
        nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(parameter.grad)  # so that the split by Hugging Face names is that of the gradients
    found = dict(native.hf_tensors(ours, pair.spec))
    if found.keys() != expected.keys():  # experts have other names on disk than in memory: let Transformers turn them
        folder = Path(tempfile.mkdtemp(prefix="parity-gradients-"))
        native.save(ours, pair.spec, folder, config=read_config(pair.folder))
        found = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        difference = (found[key] - gradient).abs().max()
        assert difference <= pair.tolerance * max(1.0, gradient.abs().max().item()), key
    theirs.zero_grad()


def check_loss(pair: Pair) -> None:
    """The training task's loss is the cross-entropy of Transformers' logits over the trained targets: of whole rows, of
    rows padded on the right, and of packed rows, whose documents Transformers computes one by one."""
    for lengths, documents in ((((24,), (24,)), None), (((10,), (24,)), None), (_PACKED, _PACKED)):
        batch = _batch(pair, lengths, documents)
        ids, targets = batch.input_ids, batch.targets
        task = SupervisedTask(pair.ours).eval()  # a mixture's balancing loss is for training alone
        with torch.no_grad():
            if documents is None:
                mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)
                rows = pair.theirs(ids, attention_mask=mask.long(), use_cache=False).logits
            else:
                alone = [one[None] for row, sizes in zip(ids, documents, strict=True) for one in row.split(sizes)]
                rows = torch.cat([pair.theirs(one, use_cache=False).logits for one in alone], 1)
            expected = nn.functional.cross_entropy(rows.flatten(0, 1), targets.flatten(), reduction="sum")
            found = task(batch).loss_sum
        assert abs(found - expected) <= pair.tolerance * max(1.0, expected)


_PACKED = ((5, 26, 9), (17, 1, 22))


def _batch(pair: Pair, lengths: tuple[tuple[int, ...], ...], documents: tuple[tuple[int, ...], ...] | None) -> Batch:
    """Rows of documents of `lengths`, padded to the longest; two of three positions are trained."""
    longest = max(map(sum, lengths))
    ids = pair.tokens(len(lengths), longest)
    targets = ids.roll(-1, 1)
    targets[:, ::3] = -100
    for row, sizes in enumerate(lengths):
        targets[row, sum(sizes) - 1 :] = -100
        targets[row, torch.tensor(sizes).cumsum(0) - 1] = -100
        ids[row, sum(sizes) :] = FIRST_ID
    trained = int((targets != -100).sum())
    return Batch(ids, targets, documents, sum(map(sum, lengths)), trained, row_tokens=tuple(map(sum, lengths)))


@torch.no_grad()
def check_padding(pair: Pair) -> None:
    """Right padding changes no token before it."""
    ids = pair.tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    expected = pair.theirs(ids, attention_mask=mask, use_cache=False).logits
    found = pair.ours.logits(pair.ours(ids))
    assert_close(found[0, :10], expected[0, :10], pair.tolerance)
    assert_close(found[1], expected[1], pair.tolerance)


@torch.no_grad()
def check_packing(pair: Pair) -> None:
    """Packed documents are what each is alone."""
    ids = pair.tokens(2, 40)
    packed = pair.ours.logits(pair.ours(ids, document_lengths=_PACKED))
    for row, sizes in enumerate(_PACKED):
        for document, found in zip(ids[row].split(sizes), packed[row].split(sizes), strict=True):
            assert_close(found, pair.theirs(document[None], use_cache=False).logits[0], pair.tolerance)


@torch.no_grad()
def check_round_trip(pair: Pair) -> None:
    """What we save is what was loaded, tensor by tensor, and Transformers loads it."""
    folder = Path(tempfile.mkdtemp(prefix="parity-saved-"))
    native.save(pair.ours, pair.spec, folder, config=read_config(pair.folder))
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    names = {name for name, _ in pair.theirs.named_parameters()}
    assert {name for name, _ in loaded.named_parameters()} == names
    for name in names:
        assert torch.equal(loaded.get_parameter(name), pair.theirs.get_parameter(name)), name


@torch.no_grad()
def check_generation(pair: Pair, *, prompt_tokens: int = 12, new_tokens: int = 12) -> None:
    """Greedy decoding with a cache: the prompt in one piece, then token by token, and the prompt in pieces."""
    prompt = pair.tokens(1, prompt_tokens)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = pair.theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0]
    cache = pair.ours.new_cache(capacity=prompt_tokens + new_tokens)
    found, ids = prompt[0].tolist(), prompt
    for _ in range(new_tokens):
        found.append(int(pair.ours.logits(pair.ours(ids, cache=cache)[:, -1:]).argmax()))
        ids = torch.tensor([[found[-1]]])
    assert found == expected.tolist()
    ids = pair.tokens(2, 30)
    cache = pair.ours.new_cache(capacity=30, batch_size=2)
    pieces = [pair.ours(piece, cache=cache) for piece in ids.split([12, 1, 1, 5, 1, 10], dim=1)]
    whole = pair.ours.logits(pair.ours(ids))
    assert_close(pair.ours.logits(torch.cat(pieces, 1)), whole, pair.tolerance)


def check_counts(pair: Pair) -> None:
    """Parameters and linear layers are counted as they are."""
    counted = arithmetic.parameters_by_part(pair.spec)
    named = dict(pair.ours.named_parameters())
    assert sum(counted.values()) == sum(parameter.numel() for parameter in named.values())
    assert counted["norms"] == sum(parameter.numel() for name, parameter in named.items() if "norm." in name)
    expected = {name: (into, out) for name, (out, into) in lora.linear_shapes(pair.ours).items()}
    assert arithmetic.linear_shapes(pair.spec) == expected
    built = dict(native.build(pair.spec).named_parameters())
    assert {name: tensor.shape for name, tensor in built.items()} == {n: p.shape for n, p in named.items()}


def check_layers(pair: Pair) -> None:
    """The spec and the modules agree on which layers run as one operation, and those give the same numbers so."""
    model = pair.fresh()
    for layer, block in zip(pair.spec.layers, model.blocks, strict=True):
        assert bool(why_not_llama(layer)) == (fused_block._why_not(block) is not None)
    if fused_block.why_not_fused(model) is not None:
        return
    ids = pair.tokens(2, 24)
    results = []
    for keep in (None, "mixer", "input"):
        if keep is not None:
            model = pair.fresh()
            lora.add_lora(model, rank=2, alpha=4)
            _perturb(model)
            fuse_blocks(model, keep=keep, implementation="reference")
        else:
            lora.add_lora(model, rank=2, alpha=4)
            _perturb(model)
        hidden = model(ids)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        gradients = torch.autograd.grad(hidden.square().mean(), list(trained.values()))
        results.append([hidden.detach(), *gradients])
    for fused in results[1:]:
        for found, expected in zip(fused, results[0], strict=True):
            assert (found - expected).abs().max() <= 10 * pair.tolerance * max(1.0, expected.abs().max().item())


def check_lora(pair: Pair, targets: str | list[str] = "all-linear") -> None:
    """PEFT loads our adapter of the targets on Transformers' model and computes the same, and we read it back."""
    from peft import PeftModel

    model = pair.fresh()
    lora.add_lora(model, rank=2, alpha=4, targets=targets)
    _perturb(model)
    folder = Path(tempfile.mkdtemp(prefix="parity-adapter-"))
    adapter.save(model, folder, base_name=str(pair.folder))
    ids = pair.tokens(2, 16)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT speaks of Conv1D and of missing revisions
        theirs = PeftModel.from_pretrained(copy.deepcopy(pair.theirs), folder)
        expected = theirs(input_ids=ids, use_cache=False).logits
        assert_close(model.logits(model(ids)), expected, pair.tolerance)
        plain = pair.ours.logits(pair.ours(ids))
        assert (expected - plain).abs().max() > 1e-3, "this adapter does nothing"
        again = pair.fresh()
        adapter.load(again, folder)
        assert_close(again.logits(again(ids)), expected, pair.tolerance)


@torch.no_grad()
def check_export(pair: Pair) -> None:
    """An adapter merged into its base is a folder that Transformers loads, and that computes what the two do."""
    folder, model = Path(tempfile.mkdtemp(prefix="parity-merged-")), pair.fresh()
    lora.add_lora(model, rank=2, alpha=4)
    _perturb(model)
    adapter.save(model, folder / "adapter", base_name=str(pair.folder))
    merge(pair.folder, folder / "adapter", folder / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "merged", attn_implementation="eager")
    ids = pair.tokens(2, 16)
    assert_close(model.logits(model(ids)), loaded(ids, use_cache=False).logits, pair.tolerance)


def _perturb(model: nn.Module) -> None:
    """Gives every trained tensor other values, so that no adapter is zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@torch.no_grad()
def check_nf4(pair: Pair) -> None:
    """Every linear layer of the blocks loads in NF4, and the model computes with the values that NF4 has."""
    model = pair.fresh(quantization="nf4")
    kinds = FrozenLinear | FrozenExpertLinear
    frozen = {path: layer for path, layer in model.named_modules() if isinstance(layer, kinds)}
    linears = [path for path, layer in pair.ours.named_modules() if isinstance(layer, FusedLinear | ExpertLinear)]
    assert list(frozen) == linears
    assert linears
    dense = copy.deepcopy(pair.ours)
    for path, layer in frozen.items():
        dense.get_submodule(path).weight.copy_(layer.weight)
    ids = pair.tokens(1, 12)
    found = model.logits(model(ids))
    assert_close(found, dense.logits(dense(ids)), pair.tolerance)
    assert not torch.equal(found, pair.ours.logits(pair.ours(ids)))


def check_bf16(pair: Pair) -> None:
    """Under autocast to bf16, as `engine.precision: bf16` trains, loss and gradients are near those in fp32."""
    ids = pair.tokens(2, 24)
    batch = Batch(ids, ids.roll(-1, 1), None, ids.numel(), ids.numel())
    task = SupervisedTask(pair.ours).eval()
    trained = [parameter for parameter in pair.ours.parameters() if parameter.requires_grad]
    losses, gradients = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(task(batch).loss_sum)
        found = torch.autograd.grad(losses[-1], trained)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert losses[0] != losses[1], "nothing ran in bf16"
    assert abs(losses[1] - losses[0]) <= 0.02 * losses[0]
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.98


def check_tied(pair: Pair) -> None:
    """With a head of its own where it was the embedding, or the embedding for a head where it was not, all the same.

    A family that cannot refuses by name.
    """
    config = copy.deepcopy(pair.theirs.config)
    config.tie_word_embeddings = not pair.spec.tied_head
    if pair.spec.head_bias:
        with pytest.raises(ModelError, match="tie_word_embeddings"):
            families.read(config.to_dict(), "config.json")
        return
    other = _pair(_Key(config), pair.tolerance)
    head, embedding = other.theirs.get_output_embeddings(), other.theirs.get_input_embeddings()
    assert other.spec.tied_head == (head.weight is embedding.weight)  # some classes tie nothing, whatever is asked for
    for check in (check_logits, check_gradients, check_round_trip, check_counts):
        check(other)


# Linear layers of Transformers that "all-linear" leaves out: routers and a shared expert's gate, which decide and do
# not compute, and Mamba's step sizes, whose weight is read past the layer.
_LEFT_OUT = ("router", "router.layer", "mlp.gate", "shared_expert_gate", "dt_proj")


def check_targets(pair: Pair) -> None:
    """All linear layers of the layers get an adapter, experts' 3-D weights too, but routers and parts of a state space.

    The latter stay fp32 in a model of half precision, and nothing but adapters is trained.
    """
    state_spaces = [name for name, module in pair.theirs.named_modules() if hasattr(module, "A_log")]
    apart = {name for name in _linears(pair.theirs) if name.endswith(_LEFT_OUT)}
    apart |= {f"{name}.out_proj" for name in state_spaces}  # PEFT refuses some; they have one when asked for by name
    model = pair.fresh(dtype=torch.bfloat16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert len([name for name in kept if name.endswith(("A_log", ".D", "dt_bias"))]) == 3 * len(state_spaces)
    found = lora.add_lora(model, rank=2, alpha=4).names
    assert set(found) == _linears(pair.theirs) - apart
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def _linears(model: nn.Module) -> set[str]:
    """Names of the linear layers but the head, and of parameters that hold all experts."""
    kinds, head = nn.Linear | Conv1D, model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if isinstance(module, kinds) and module is not head}
    return names | {name for name, tensor in model.named_parameters() if tensor.dim() == 3 and ".experts." in name}


CHECKS: dict[str, Callable[[Pair], None]] = {
    "logits": check_logits,
    "gradients": check_gradients,
    "loss": check_loss,
    "padding": check_padding,
    "packing": check_packing,
    "round trip": check_round_trip,
    "generation": check_generation,
    "counts": check_counts,
    "layers": check_layers,
    "lora": check_lora,
    "export": check_export,
    "nf4": check_nf4,
    "bf16": check_bf16,
    "tied": check_tied,
    "targets": check_targets,
}


def every_check(cases: Mapping[str, Any], checks: Iterable[str] = CHECKS) -> list[Any]:
    """Parameters (name, check) of all `cases`: configurations, or stand-ins whose names begin with the model type."""
    return [
        pytest.param(name, check, marks=pytest.mark.proves(check, model_type=_model_type(name, case)))
        for name, case in cases.items()
        for check in checks
    ]


def proved(names: Iterable[str], *properties: str) -> list[Any]:
    """Parameters `name` of a test that stands for `properties` of the model type that each begins with."""
    return [
        pytest.param(name, marks=pytest.mark.proves(*properties, model_type=name.partition(" ")[0])) for name in names
    ]


def _model_type(name: str, case: Any) -> str:
    return case.model_type if isinstance(case, PretrainedConfig) else name.partition(" ")[0]
