"""Policies and recordings are bound to all that changes tokens: compute type, end and start ids, tokenizer, config."""

import copy
import json
from importlib import resources

import numpy as np
import pandas as pd
import pytest
import torch
from frameworks import FRAMEWORKS
from t5_reference import LENGTH, prompts
from tokenizers import Tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import riskcal
import riskcal_adapters.jax
import riskcal_adapters.torch
from riskcal import ExitPolicy, RiskcalError, Runs
from riskcal_adapters import fingerprint, record

pytestmark = pytest.mark.usefixtures("barely_optimized")

CHECKPOINT = resources.files("riskcal_adapters") / "g2p" / "checkpoint"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def in_type(framework, model, dtype):
    """The same weights, computed in another type."""
    if framework == "torch":
        typed = copy.deepcopy(model).to(getattr(torch, dtype))
        return riskcal_adapters.torch.EarlyExitT5(typed)
    # JAX keeps float32 weights and computes in the type asked for: give both decoders the same rounded ones
    rounded = copy.deepcopy(model).to(torch.bfloat16).float() if dtype == "bfloat16" else model
    return riskcal_adapters.jax.EarlyExitT5(
        riskcal_adapters.jax.from_torch(rounded), dtype=dtype, stacked=True
    )


def decoder_of(framework, model, tokenizer=None):
    if framework == "torch":
        fast = None if tokenizer is None else PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        return riskcal_adapters.torch.EarlyExitT5(model, fast)
    return riskcal_adapters.jax.EarlyExitT5(
        riskcal_adapters.jax.from_torch(model), tokenizer, stacked=True
    )


def bound(decoder, **changes):
    """A policy that names all that the decoder says of itself."""
    named = {"weights": decoder.weights, "dtype": decoder.dtype, "config": decoder.settings}
    named["tokenizer"] = decoder.tokenizer_digest
    return ExitPolicy(threshold=0.5, **named | changes)


def generate(decoder, policy):
    ids, mask = prompts(2)
    return decoder.generate(ids.numpy(), mask.numpy(), policy=policy, max_new_tokens=LENGTH)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_policy_of_one_compute_type_is_refused_in_another(gated_t5, framework):
    single, short = (in_type(framework, gated_t5, dtype) for dtype in ("float32", "bfloat16"))
    assert (single.dtype, short.dtype) == ("float32", "bfloat16")
    generate(single, bound(single))
    generate(short, bound(short))
    with pytest.raises(
        RiskcalError,
        match=r"^dtype: the policy was made for a decoder that computes in bfloat16, this one .* float32",
    ):
        generate(single, bound(single, dtype="bfloat16"))
    with pytest.raises(
        RiskcalError,
        match=r"^dtype: the policy was made for a decoder that computes in float32, this one .* bfloat16",
    ):
        generate(short, bound(short, dtype="float32"))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_policy_that_names_weights_and_no_type_is_one_of_float32(gated_t5, framework):
    single, short = (in_type(framework, gated_t5, dtype) for dtype in ("float32", "bfloat16"))
    generate(single, ExitPolicy(threshold=0.5, weights=single.weights))
    with pytest.raises(
        RiskcalError,
        match=r"^dtype: .*computes in float32 \(it names weights and no type, as policies once did\)",
    ):
        generate(short, ExitPolicy(threshold=0.5, weights=short.weights))
    generate(short, ExitPolicy(threshold=0.5))  # written by hand: bound to nothing


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("generation_config", "eos_token_id", 7),
        ("generation_config", "eos_token_id", [1, 7]),
        ("generation_config", "decoder_start_token_id", 3),
        ("generation_config", "pad_token_id", 5),
        ("config", "layer_norm_epsilon", 1e-2),
        ("config", "relative_attention_max_distance", 12),
    ],
)
def test_a_policy_is_bound_to_every_setting_that_changes_tokens(
    gated_t5, framework, where, name, value
):
    other = copy.deepcopy(gated_t5)
    setattr(getattr(other, where), name, value)
    if where == "config":  # modules keep what they were made with
        rebuilt = type(other)(other.config).eval()
        rebuilt.lm_head.weight = torch.nn.Parameter(torch.empty_like(gated_t5.lm_head.weight))
        rebuilt.load_state_dict(gated_t5.state_dict())
        rebuilt.generation_config = gated_t5.generation_config
        other = rebuilt
    mine, theirs = (decoder_of(framework, model) for model in (gated_t5, other))
    assert mine.weights == theirs.weights
    generate(theirs, bound(theirs))
    with pytest.raises(
        RiskcalError,
        match=rf"^config: {name} is .* in the model that the policy was made for, and ",
    ):
        generate(theirs, bound(mine))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_setting_that_the_decoder_does_not_know_is_refused(gated_t5, framework):
    decoder = decoder_of(framework, gated_t5)
    with pytest.raises(
        RiskcalError, match=r"^config: softcap is 30.0 .* and none in the decoder's"
    ):
        generate(decoder, bound(decoder, config=decoder.settings | {"softcap": 30.0}))
    rows = [bound(decoder), bound(decoder, config={"eos_token_id": [2]})]
    with pytest.raises(RiskcalError, match=r"^config: eos_token_id is \[2\] .* policy of row 1"):
        generate(decoder, rows)


def test_both_frameworks_know_the_same_model_and_tokenizer(tiny_t5, tokenizer):
    ours, theirs = (decoder_of(framework, tiny_t5, tokenizer) for framework in FRAMEWORKS)
    assert bound(ours) == bound(theirs)
    assert (
        riskcal_adapters.torch.load_example().tokenizer_digest
        == riskcal_adapters.jax.load_example().tokenizer_digest
    )
    # and bfloat16 is not the same computation in both: JAX keeps logits and attention weights in float32
    single, short = (in_type(framework, tiny_t5, "bfloat16") for framework in FRAMEWORKS)
    assert single.weights == short.weights
    with pytest.raises(RiskcalError, match=r"^config: logits_dtype is 'bfloat16'"):
        generate(short, bound(single))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_policy_is_bound_to_the_tokenizer(gated_t5, tokenizer, framework):
    content = json.loads(tokenizer.to_str())
    content["normalizer"] = {"type": "Lowercase"}
    other = Tokenizer.from_str(json.dumps(content))
    mine, theirs, none = (decoder_of(framework, gated_t5, one) for one in (tokenizer, other, None))
    generate(mine, bound(mine))
    with pytest.raises(
        RiskcalError,
        match=r"^tokenizer: the policy was made for prompts read by the tokenizer \w{32}",
    ):
        generate(theirs, bound(mine))
    assert none.tokenizer_digest is None
    generate(none, bound(mine))  # who makes ids elsewhere answers for them


def test_a_tokenizers_name_is_how_it_reads_and_not_what_was_asked_of_it_last(tokenizer):
    before = fingerprint.of_tokenizer(tokenizer)
    used = Tokenizer.from_str(tokenizer.to_str())
    used.enable_truncation(2)
    used.enable_padding(pad_id=0, pad_token="<pad>")
    assert fingerprint.of_tokenizer(used) == before
    assert fingerprint.of_tokenizer(PreTrainedTokenizerFast(tokenizer_object=used)) == before
    used.add_tokens(["zz"])
    assert fingerprint.of_tokenizer(used) != before
    slow = fingerprint.of_tokenizer(ByT5Tokenizer())
    assert slow == fingerprint.of_tokenizer(ByT5Tokenizer())
    assert slow not in (before, fingerprint.of_tokenizer(ByT5Tokenizer(extra_ids=0)))


# -- recordings --------------------------------------------------------------------------------------------------------

WORDS = ["calm", "early", "exit", "layer", "risk", "token"]


def recorded(folder, decoder, **changes):
    """The first words as one shard; the rest are left for whoever goes on."""
    options = {"shard_prompts": 2, "batch_size": 2, "max_new_tokens": 8, "progress": False}
    return record(WORDS, loads(decoder), [0.3, 0.9], folder, **options | changes)


def loads(decoder):
    def load():
        return decoder

    return load


def changed(decoder, name, value):
    """The same weights and tokenizer with one setting of generation changed."""
    model = copy.deepcopy(decoder.model)
    setattr(model.generation_config, name, value)
    return type(decoder)(model, decoder.tokenizer)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_was_recorded_stands_in_the_policy(tmp_path, framework):
    decoder = getattr(riskcal_adapters, framework).load_example()
    runs = Runs.read(recorded(tmp_path / "runs", decoder))
    policy = riskcal.calibrate(runs, delta=0.99, epsilon=0.5).policy()
    assert (policy.weights, policy.dtype) == (decoder.weights, "float32")
    assert (policy.tokenizer, policy.config) == (decoder.tokenizer_digest, decoder.settings)
    again = ExitPolicy(**json.loads(policy.model_dump_json()))
    assert again == policy
    decoder.generate(*decoder.encode(WORDS[:2]), policy=again)
    with pytest.raises(RiskcalError, match=r"^config: eos_token_id is \[1\]"):
        changed(decoder, "eos_token_id", 20).generate(*decoder.encode(WORDS[:2]), policy=again)


@pytest.mark.parametrize(
    ("name", "value"), [("eos_token_id", 20), ("decoder_start_token_id", 9), ("pad_token_id", 3)]
)
def test_a_recording_is_not_resumed_with_other_settings_behind_the_same_name(tmp_path, name, value):
    decoder = riskcal_adapters.torch.load_example()
    folder = recorded(tmp_path / "runs", decoder)
    (folder / "runs-00001.parquet").unlink()
    with pytest.raises(
        RiskcalError,
        match=rf'^config: {{"{name}": .*}} in the recording that .*, {{"{name}": .*}} now',
    ):
        recorded(folder, changed(decoder, name, value))
    recorded(folder, decoder)
    assert Runs.read(folder).n == len(WORDS)


def test_a_recording_is_not_resumed_with_another_type_or_tokenizer(tmp_path):
    decoder = riskcal_adapters.torch.load_example()
    folder = recorded(tmp_path / "runs", decoder)
    (folder / "runs-00001.parquet").unlink()
    content = json.loads(decoder.tokenizer.backend_tokenizer.to_str())
    content["normalizer"] = {"type": "Lowercase"}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(RiskcalError, match=r'^tokenizer: "\w{32}" in the recording that'):
        recorded(folder, riskcal_adapters.torch.EarlyExitT5(decoder.model, other))
    wide = riskcal_adapters.torch.EarlyExitT5(
        copy.deepcopy(decoder.model).double(), decoder.tokenizer
    )
    assert wide.weights == decoder.weights
    with pytest.raises(
        RiskcalError, match=r'^dtype: "float32" in the recording that .*, "float64" now'
    ):
        recorded(folder, wide)


def test_a_decoder_that_says_nothing_of_itself_is_recorded_as_before(tmp_path):
    class Plain:
        """As from elsewhere: attributes of these names that mean something else."""

        n_layers, dtype, tokenizer, config = 2, np.float32, object(), object()

        def encode(self, texts):
            return np.ones((len(texts), 1), int), np.ones((len(texts), 1), int)

        def generate(self, input_ids, attention_mask, *, policy, max_new_tokens):
            exits = np.full((len(input_ids), 1), 2 if policy.is_full_model else 1)
            return type("Generation", (), {"tokens": exits, "exit_layers": exits})()

        def decode(self, tokens):
            return ["a"] * len(tokens)

    folder = recorded(tmp_path / "runs", Plain())
    held = json.loads(pd.read_parquet(folder / "runs-00000.parquet")["policy"].iloc[0])
    assert held == {"max_new_tokens": 8, "n_layers": 2}


def test_a_recording_of_another_format_says_what_to_do(tmp_path):
    decoder = riskcal_adapters.torch.load_example()
    folder = recorded(tmp_path / "runs", decoder)
    settings = json.loads((folder / "recording.json").read_text())
    (folder / "recording.json").write_text(json.dumps(settings | {"format": 2}))
    with pytest.raises(
        RiskcalError, match=r"began \(format 2, now 3\); read it, or .* record to another folder"
    ):
        recorded(folder, decoder)
    assert Runs.read(folder).n == len(WORDS)
    recorded(tmp_path / "other", decoder)


def test_old_policies_load_with_the_digest_that_they_had():
    """Digests of policies that were made before these fields existed, whose files named the cache and the batching."""
    saved = {
        "cache": "project",
        "batching": "diverge",
        "max_new_tokens": 64,
        "n_layers": 8,
        "weights": "ab" * 16,
    }
    old = ExitPolicy(threshold=0.9, measure="max", **saved)
    assert old.digest() == "4ea0ffa883f788d97b067aa9271f9871"
    assert ExitPolicy.full_model().digest() == "2afb9b83f9314e5d029766197f539792"
