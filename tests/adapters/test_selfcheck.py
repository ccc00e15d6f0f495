"""What is attached to a model is refused, not ignored: adapters, hooks, biases, norms, forwards and embeddings of its own."""

import copy
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from t5_reference import FULL, LENGTH, family, hugging_face, prompts
from torch import nn
from transformers import (
    T5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
)

import riskcal_adapters.jax
from riskcal import ExitPolicy, RiskcalError
from riskcal_adapters import fingerprint
from riskcal_adapters.torch import EarlyExitT5
from riskcal_adapters.torch.caches import LayerCache
from riskcal_adapters.torch.weights import PositionBias


class LowRank(nn.Module):
    """A linear layer and a low-rank update beside it, as adapters put it."""

    def __init__(self, base, size=0.05):
        super().__init__()
        self.base, self.weight = base, base.weight
        self.down = nn.Parameter(torch.randn(2, base.in_features) * size)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) * size)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T

    def merged(self):
        linear = nn.Linear(self.base.in_features, self.base.out_features, bias=False)
        linear.weight.data = self.base.weight.data + self.up.data @ self.down.data
        return linear


class LoRALinear(nn.Module):
    """The same without a weight of its own name."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return self.base_layer(x) * 1.01


class OtherNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return self.weight * nn.functional.layer_norm(x, x.shape[-1:])


class Subclass(T5ForConditionalGeneration):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.1
        return out


def low_rank(model):
    own = model.decoder.block[2].layer[0].SelfAttention
    own.q = LowRank(own.q)


def wrapped(model):
    own = model.encoder.block[0].layer[0].SelfAttention
    own.v = LoRALinear(own.v)


def hook(model):
    model.decoder.block[1].layer[2].register_forward_hook(
        lambda module, inputs, output: output * 1.01
    )


def hook_before(model):
    model.encoder.final_layer_norm.register_forward_pre_hook(
        lambda module, inputs: (inputs[0] + 0.1,)
    )


def hook_on_the_whole(model):
    model.register_forward_hook(
        lambda module, inputs, output: {**output, "logits": output.logits + torch.arange(41.0)}
    )


def bias(model):
    linear = model.decoder.block[0].layer[2].DenseReluDense.wo
    linear.bias = nn.Parameter(torch.full((linear.out_features,), 0.01))


def head_bias(model):
    model.lm_head.bias = nn.Parameter(torch.randn(41) * 0.1)


def norm(model):
    model.decoder.final_layer_norm = OtherNorm(model.decoder.final_layer_norm)


def gone(model):
    model.encoder.block[1].layer[0].layer_norm = nn.Identity()


def subclass(model):
    model.__class__ = Subclass


def own_forward(model):
    before = model.encoder.forward
    model.encoder.forward = lambda *args, **kwargs: scaled(before(*args, **kwargs))


def scaled(out):
    out.last_hidden_state = out.last_hidden_state * 0.9
    return out


def embeddings(model):
    model.decoder.embed_tokens = copy.deepcopy(model.shared)
    with torch.no_grad():
        model.decoder.embed_tokens.weight[40] += 1.0  # a single token


def epsilon(model):
    model.config.layer_norm_epsilon = 0.1  # its modules keep what they were made with


ATTACHED = [low_rank, wrapped, hook, hook_before, hook_on_the_whole, bias, head_bias, norm, gone, subclass, own_forward,
            embeddings, epsilon]  # fmt: skip


@pytest.mark.parametrize("attach", ATTACHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_weights_do_not_say_is_refused(tiny_t5, attach, dtype):
    model = copy.deepcopy(tiny_t5).to(dtype)
    EarlyExitT5(model)
    torch.manual_seed(0)
    attach(model)
    model.to(dtype)
    with pytest.raises(RiskcalError, match=r"^model: .*(merge|set model.decoder.embed_tokens)"):
        EarlyExitT5(model)


@pytest.mark.parametrize("attach", [low_rank, hook, bias, subclass, norm])
def test_jax_refuses_the_same_on_taking_a_model_over(tiny_t5, attach):
    model = copy.deepcopy(tiny_t5)
    torch.manual_seed(0)
    attach(model)
    with pytest.raises(RiskcalError, match=r"^model: "):
        riskcal_adapters.jax.from_torch(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_short_types_all_that_looks_attached_is_refused(tiny_t5, dtype):
    """Rounding would hide a small update."""
    model = copy.deepcopy(tiny_t5).to(dtype)
    EarlyExitT5(model)
    model.decoder.block[0].layer[2].DenseReluDense.wo = LowRank(
        model.decoder.block[0].layer[2].DenseReluDense.wo, 1e-4
    )
    with pytest.raises(
        RiskcalError, match=r"^model: decoder.block.0.layer.2.DenseReluDense.wo is a .*LowRank"
    ):
        EarlyExitT5(model.to(dtype))


def test_the_message_names_what_is_there_and_its_remedy_works(tiny_t5):
    model = copy.deepcopy(tiny_t5)
    torch.manual_seed(0)
    low_rank(model)
    handle = (
        model.decoder.block[1]
        .layer[2]
        .register_forward_hook(lambda module, inputs, output: output * 1.01)
    )
    with pytest.raises(RiskcalError, match=r"SelfAttention.q is a .*LowRank.*decoder.block.1.layer.2 has a forward hook|"
                       r"decoder.block.1.layer.2 has a forward hook.*SelfAttention.q is a .*LowRank"):  # fmt: skip
        EarlyExitT5(model)
    handle.remove()
    own = model.decoder.block[2].layer[0].SelfAttention
    own.q = own.q.merged()
    generation = EarlyExitT5(model).generate(*prompts(3), policy=FULL, max_new_tokens=LENGTH)
    assert generation.tokens.equal(hugging_face(model, *prompts(3)))
    assert EarlyExitT5(model).weights != EarlyExitT5(tiny_t5).weights


def test_a_model_whose_forward_fails_says_so(tiny_t5):
    model = copy.deepcopy(tiny_t5)
    model.decoder.block[0].layer[1].register_forward_hook(lambda module, inputs, output: output[99])
    with pytest.raises(RiskcalError, match=r"^model: its own forward fails"):
        EarlyExitT5(model)


def test_hooks_that_change_nothing_and_training_mode_are_welcome(tiny_t5):
    model = copy.deepcopy(tiny_t5)
    seen = []
    model.decoder.block[1].register_forward_hook(lambda module, inputs, output: seen.append(1))
    model.config.dropout_rate = 0.5
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    model.decoder.block[0].eval()
    modes = [module.training for module in model.modules()]
    state, builtin = torch.get_rng_state(), random.getstate()
    decoder = EarlyExitT5(model)
    assert seen
    assert [module.training for module in model.modules()] == modes
    assert torch.get_rng_state().equal(state)
    assert random.getstate() == builtin
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.is_grad_enabled()
    assert decoder.generate(*prompts(2), max_new_tokens=3).tokens.equal(
        EarlyExitT5(tiny_t5).generate(*prompts(2), max_new_tokens=3).tokens
    )


def test_a_model_that_says_not_a_number_can_still_be_looked_at(tiny_t5):
    model = copy.deepcopy(tiny_t5)
    with torch.no_grad():
        model.decoder.block[-1].layer[-1].DenseReluDense.wo.weight[0] = torch.nan
    EarlyExitT5(model)


def test_quantized_models_are_refused(tiny_t5):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(tiny_t5), {nn.Linear}, dtype=torch.qint8
        )
    with pytest.raises(
        RiskcalError, match=r"^model: holds a torch.*Linear, which has no floating-point weight"
    ):
        EarlyExitT5(quantized)
    with pytest.raises(RiskcalError, match=r"^model: "):
        riskcal_adapters.jax.from_torch(quantized)


# -- the rest of the family --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mt5", "umt5"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_other_classes_of_the_family_are_decoded_as_hugging_face_does(kind, side):
    model = family(kind)
    decoder = EarlyExitT5(model)
    for rows, length in ((1, 30), (7, LENGTH)):
        generation = decoder.generate(*prompts(rows, side), policy=FULL, max_new_tokens=length)
        assert generation.tokens.equal(
            hugging_face(model, *prompts(rows, side), max_new_tokens=length)
        )
    assert len(generation.tokens.unique()) > 5


def test_caches_know_each_layers_bias():
    """The exact caches are two ways to the same, rows alone and together as well."""
    decoder = EarlyExitT5(family("umt5"))
    ways = {
        cache: ExitPolicy(threshold=0.05, cache=cache)
        for cache in ("project", "deferred", "recompute")
    }
    ways["regroup"] = ExitPolicy(threshold=0.05, batching="regroup")
    made = {
        name: decoder.generate(*prompts(7), policy=policy, max_new_tokens=20)
        for name, policy in ways.items()
    }
    assert made["deferred"].tokens.equal(made["recompute"].tokens)
    assert made["project"].tokens.equal(made["regroup"].tokens)
    assert len(made["project"].exit_layers.unique()) > 2


def test_a_checkpoint_of_another_class_of_the_family_is_refused(tmp_path):
    family("umt5").save_pretrained(tmp_path)
    lost = T5ForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(
        RiskcalError,
        match=r"^model: T5For.*UMT5ForConditionalGeneration, whose layers each have a bias",
    ):
        EarlyExitT5(lost)
    EarlyExitT5(UMT5ForConditionalGeneration.from_pretrained(tmp_path))
    family("mt5").save_pretrained(tmp_path / "mt5")
    EarlyExitT5(T5ForConditionalGeneration.from_pretrained(tmp_path / "mt5"))
    made_up = UMT5ForConditionalGeneration.from_pretrained(tmp_path / "mt5")
    with pytest.raises(
        RiskcalError,
        match=r"^model: UMT5For.*MT5ForConditionalGeneration, whose layers share one bias",
    ):
        EarlyExitT5(made_up)


# -- shared by threads, and large --------------------------------------------------------------------------------------


class Raced(PositionBias):
    """What is kept for 40 positions is replaced by what is kept for 5 before the call that asked for 40 goes on."""

    def replace(self, name, value, size):
        if self.stored is not None and size in self.stored:
            if size == 5:
                self.stored[40].wait(30)
            self.kept[name] = value
            self.stored[size].set()
            if size == 40:
                self.stored[5].wait(30)
        else:
            self.kept[name] = value

    def _between(self, first, length):
        if self.stored is not None:
            self.both.wait(30)  # have seen that what is kept is too short
        return super()._between(first, length)

    stored, kept, both = None, {}, threading.Barrier(2)
    _square = property(
        lambda self: self.kept["square"],
        lambda self, made: self.replace("square", made, made.shape[-1]),
    )
    _rows = property(
        lambda self: self.kept["rows"], lambda self, made: self.replace("rows", made, len(made))
    )


@pytest.mark.parametrize("name", ["square", "rows"])
def test_threads_that_share_a_decoder_do_not_take_each_others_biases(tiny_t5, name):
    bias = Raced(tiny_t5.encoder, torch.float32)
    bias.stored = {5: threading.Event(), 40: threading.Event()}
    got = {}
    threads = [
        threading.Thread(target=lambda n=n: got.update({n: getattr(bias, name)(n)}))
        for n in (40, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in (5, 40):
        assert (got[n].shape[-1] if name == "square" else len(got[n])) == n


def test_decoding_in_threads_is_decoding(tiny_t5):
    decoder = EarlyExitT5(tiny_t5)
    policy = ExitPolicy(threshold=0.1)
    generator = torch.Generator().manual_seed(1)
    asked = [
        torch.randint(2, 41, (1, int(n)), generator=generator)
        for n in torch.randint(1, 60, (60,), generator=generator)
    ]
    expected = [
        EarlyExitT5(tiny_t5).generate(ids, policy=policy, max_new_tokens=5).tokens for ids in asked
    ]
    failed = []

    def work(order):
        for i in order:
            made = decoder.generate(asked[i], policy=policy, max_new_tokens=5).tokens
            if not made.equal(expected[i]):
                failed.append(i)

    threads = [
        threading.Thread(target=work, args=(np.random.default_rng(seed).permutation(60),))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_cache_goes_on_with_what_is_filled_and_no_more(monkeypatch):
    batch, heads, width, limit = 4, 2, 3, 1000
    rows = torch.full((limit * batch, 3 * heads * width), torch.nan)
    own = LayerCache.on(rows, batch, heads, width, None)
    own.filled, own.filled_rows[:] = 6, [0, 8, 3, 2]
    rows[: 8 * batch] = torch.arange(8 * batch)[:, None].float()
    copied, select = [], torch.index_select

    def watched(values, *arguments, **options):
        copied.append(len(values))
        return select(values, *arguments, **options)

    monkeypatch.setattr(torch, "index_select", watched)
    kept = own.of(torch.tensor([3, 1]), np.array([3, 1]), batch, 0)
    assert copied == [8]
    assert kept.rows.shape == (limit * 2, rows.shape[1])
    assert kept.rows[: 8 * 2, 0].tolist() == [p * batch + row for p in range(8) for row in (3, 1)]
    assert kept.filled_rows.tolist() == [2, 8]


def test_a_fingerprint_holds_a_part_of_the_weights_at_a_time(monkeypatch):
    monkeypatch.setattr(fingerprint, "_PART", 7)
    rng = np.random.default_rng(0)
    named = {
        "shared.weight": rng.normal(size=(11, 3)),
        "a.weight": rng.normal(size=(5,)),
        "b": rng.normal(size=()),
    }
    named["lm_head.weight"] = named["shared.weight"].copy()
    sizes = []

    def read(part):
        sizes.append(len(part))
        return np.asarray(part)

    in_parts = fingerprint.of_weights(named.items(), read)
    assert max(sizes) == 7
    monkeypatch.undo()
    assert in_parts == fingerprint.of_weights(named.items())
    del named["lm_head.weight"]
    assert in_parts == fingerprint.of_weights(named.items())


def test_names_of_weights_are_those_that_policies_hold():
    """As they were before weights were read by parts."""
    generator = np.random.default_rng(3)
    named = {
        name: np.asarray(generator.normal(size=shape), "<f4")
        for name, shape in {"shared.weight": (4, 3), "x": (2,), "y": ()}.items()
    }
    assert fingerprint.of_weights(named.items()) == "c7087a7f00754ba4df8ca633eba600f4"
    assert fingerprint.of_classifier(np.ones(3), np.zeros(())) == "a8968adf16fe2bf8741f459049f7cbc7"
