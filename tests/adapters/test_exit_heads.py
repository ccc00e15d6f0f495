"""Exit heads: their shapes and logits, what names them, folders that hold them, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_causal
import torch

from riskcal import RiskcalError
from riskcal_adapters.torch import ExitHead, check_heads, load_heads, save_heads

V, D, L = tiny_causal.VOCABULARY, tiny_causal.WIDTH, tiny_causal.LAYERS
IDS = [7, 3, 41, 12]
MODELS = {
    "llama": tiny_causal.llama(),
    "untied llama": tiny_causal.llama(tied=False),
    "gpt2": tiny_causal.gpt2(),
}
TEXT = torch.tensor([[5, 9, 33, 2, 48]])


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]


@torch.no_grad()
def last_raw(model):
    """States after the last layer, before the final norm."""
    blocks = getattr(model.base_model, "layers", None) or model.base_model.h
    seen = []

    def keep(module, given, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks[-1].register_forward_hook(keep)
    logits = model(TEXT).logits[0]
    handle.remove()
    return seen[0].reshape(-1, D), logits


def test_row_25_a_copied_head_at_the_last_layer_is_the_model(model):
    raw, logits = last_raw(model)
    torch.testing.assert_close(ExitHead.copied(model).logits(raw), logits, rtol=1e-5, atol=1e-5)


def test_a_small_head_has_the_full_heads_logits_of_its_tokens_and_says_their_ids(model):
    raw, logits = last_raw(model)
    head = ExitHead.small(model, IDS)
    torch.testing.assert_close(head.logits(raw), logits[:, IDS], rtol=1e-5, atol=1e-5)
    assert head.said(raw).tolist() == [IDS[i] for i in logits[:, IDS].argmax(-1)]
    assert head.ids.tolist() == IDS


def test_low_rank_heads_are_the_nearest_of_their_rank_and_exact_at_full_rank(model):
    raw, logits = last_raw(model)
    torch.testing.assert_close(
        ExitHead.low_rank(model, D).logits(raw), logits, rtol=1e-4, atol=1e-4
    )
    weight = model.get_output_embeddings().weight.detach().double()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    head = ExitHead.low_rank(model, 5)
    product = head.weight.double() @ head.down.double()
    torch.testing.assert_close(product, (u[:, :5] * s[:5]) @ v[:5], rtol=1e-4, atol=1e-5)
    rows = ExitHead.low_rank(model, 4, ids=IDS)
    torch.testing.assert_close(rows.weight @ rows.down, weight[IDS].float(), rtol=1e-4, atol=1e-5)


def test_sizes_are_counted(model):
    norm = D if ExitHead.copied(model).norm_bias is None else 2 * D
    assert ExitHead.copied(model).parameters == norm + V * D
    assert ExitHead.low_rank(model, 3).parameters == norm + 3 * (V + D)
    small = ExitHead.small(model, IDS)
    assert (small.parameters, small.bytes) == (norm + 4 * D, 4 * (norm + 4 * D) + 8 * 4)
    assert small.to(torch.bfloat16).bytes == 2 * (norm + 4 * D) + 8 * 4


def test_fresh_heads_are_their_seeds(model):
    raw, _ = last_raw(model)
    one, same, other = (ExitHead.fresh(model, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.logits(raw), same.logits(raw))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.logits(raw).shape == (5, V)
    assert ExitHead.fresh(model, ids=IDS).logits(raw).shape == (5, 4)
    assert torch.isfinite(one.logits(raw)).all()


def test_whatever_changes_logits_or_ids_changes_the_fingerprint(model):
    head = ExitHead.small(model, IDS)
    norm, weight = head.norm_weight.clone(), head.weight.clone()
    norm[0] += 1e-3
    weight[2, 1] += 1e-3
    others = [
        dataclasses.replace(head, norm_weight=norm),
        dataclasses.replace(head, weight=weight),
        dataclasses.replace(head, ids=torch.tensor([3, 7, 41, 12])),
        dataclasses.replace(head, ids=None),
        dataclasses.replace(head, epsilon=1e-3),
        ExitHead.low_rank(model, 3, ids=IDS),
    ]
    named = {head.fingerprint, *(other.fingerprint for other in others)}
    assert len(named) == 1 + len(others)
    assert dataclasses.replace(head, backbone="other").fingerprint == head.fingerprint


def test_heads_come_back_from_a_folder(model, tmp_path):
    heads = {
        2: ExitHead.small(model, IDS).to(torch.float16),
        3: ExitHead.low_rank(model, 3),
        L: dataclasses.replace(ExitHead.copied(model), backbone="1" * 32),
    }
    for _ in range(2):  # a folder that is there is replaced
        save_heads(heads, tmp_path / "heads")
    found = load_heads(tmp_path / "heads")
    raw, _ = last_raw(model)
    assert list(found) == [2, 3, L]
    for layer, head in heads.items():
        assert found[layer].fingerprint == head.fingerprint
        assert found[layer].backbone == head.backbone
        assert found[layer].weight.dtype == torch.float32
        assert torch.equal(found[layer].logits(raw), head.to(torch.float32).logits(raw))
    assert {path.name for path in tmp_path.iterdir()} == {"heads"}


# -- what is refused ---------------------------------------------------------------------------------------------------


def changed(head, **parts):
    return dataclasses.replace(head, **parts)


def nan_head(model):
    head = ExitHead.copied(model)
    head.weight[3, 1] = float("nan")
    return head


REFUSED = {
    "no layer 0": (lambda m: {0: ExitHead.copied(m)}, r"0 is no layer .* numbered 1 to 4"),
    "no layer L + 1": (lambda m: {2: ExitHead.copied(m), 5: ExitHead.copied(m)}, "5 is no layer"),
    "no number": (lambda m: {"2": ExitHead.copied(m)}, "'2' is no layer"),
    "width": (
        lambda m: {2: ExitHead(torch.ones(8), None, 1e-5, torch.ones(V, 8))},
        rf"heads\[2\]: reads states of width 8, and the model's have {D}",
    ),
    "vocabulary": (
        lambda m: {2: changed(ExitHead.copied(m), weight=torch.ones(V - 1, D))},
        f"tokens 0 to {V - 2}, and the model's vocabulary has {V}",
    ),
    "foreign id": (
        lambda m: {2: changed(ExitHead.small(m, IDS), ids=torch.tensor([1, 2, 3, V]))},
        f"tokens 0 to {V}",
    ),
    "NaN": (lambda m: {2: nan_head(m)}, r"heads\[2\].weight: 1 of .* first at \[3, 1\]"),
    "another model": (
        lambda m: {2: changed(ExitHead.copied(m), backbone="ab" * 16)},
        r"heads\[2\]: was trained for a model with weights (ab){16}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_heads_of_another_model_are_refused(model, case):
    heads, message = REFUSED[case]
    with pytest.raises(RiskcalError, match=message):
        check_heads(heads(model), model)


def test_heads_that_fit_are_not_refused(model):
    check_heads({1: ExitHead.small(model, IDS), L: ExitHead.low_rank(model, 2)}, model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: ExitHead.small(m, []), "ids: there is none"),
        (lambda m: ExitHead.small(m, [3, V]), f"ids: {V} at index 1"),
        (lambda m: ExitHead.small(m, [3, 3]), "name each token once"),
        (lambda m: ExitHead.low_rank(m, D + 1), f"rank: {D + 1}, .* at most {D}"),
        (lambda m: changed(ExitHead.copied(m), weight=torch.ones(V, D + 1)), "weight: is "),
        (lambda m: changed(ExitHead.copied(m), epsilon=0.0), "epsilon: 0"),
        (lambda m: changed(ExitHead.copied(m), ids=torch.tensor([1])), "ids: "),
    ],
)
def test_heads_that_are_none_are_refused(model, make, message):
    with pytest.raises(RiskcalError, match=message):
        make(model)


def test_a_norm_of_another_kind_is_refused():
    model = tiny_causal.llama()

    class Shifted(torch.nn.Module):  # as Gemma's: one is added to the gain
        def __init__(self, norm):
            super().__init__()
            self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

        def forward(self, state):
            scale = torch.rsqrt(state.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return state * scale * (1 + self.weight)

    model.model.norm = Shifted(model.model.norm)
    with pytest.raises(RiskcalError, match="Shifted, is neither an RMSNorm nor a LayerNorm"):
        ExitHead.copied(model)


def test_a_tilde_is_the_home_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_heads({2: ExitHead.small(model, IDS)}, "~/heads")
    assert set(load_heads("~/heads")) == set(load_heads(tmp_path / "heads")) == {2}
    assert not (tmp_path / "~").exists()


def test_folders_that_were_tampered_with_are_refused(model, tmp_path):
    with pytest.raises(RiskcalError, match="there is none"):
        save_heads({}, tmp_path / "none")
    with pytest.raises(RiskcalError, match="not finite"):
        save_heads({2: nan_head(model)}, tmp_path / "nan")
    with pytest.raises(RiskcalError, match="written by save_heads"):
        load_heads(tmp_path)
    save_heads({2: ExitHead.small(model, IDS)}, tmp_path / "heads")
    card = tmp_path / "heads" / "heads.json"
    said = json.loads(card.read_text())
    said["heads"]["2"]["epsilon"] = 0.5
    card.write_text(json.dumps(said))
    with pytest.raises(RiskcalError, match="layer 2 is not the one that was written"):
        load_heads(tmp_path / "heads")
    assert np.array_equal(sorted(path.name for path in tmp_path.iterdir()), ["heads"])
