"""Self-supervised training of exit heads: self-generated text, losses and their ceiling, training, resuming."""

import math

import numpy as np
import pytest
import tiny_causal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from riskcal import RiskcalError
from riskcal_adapters.torch import ExitHead, check_heads, training
from riskcal_adapters.torch.exit_head_checks import backbone_fingerprint
from riskcal_adapters.torch.training import descent, exit_heads, self_generated

V, L = tiny_causal.VOCABULARY, tiny_causal.LAYERS
MODEL = tiny_causal.llama()
PROMPTS = [[5], [9, 33, 7], [21, 3, 4, 8, 11], [40, 41]]
WINDOW = 24


@pytest.fixture(scope="module")
def sequences():
    return training.self_generate(MODEL, PROMPTS, tokens=150, window=WINDOW, seed=1, batch=3)


@pytest.fixture(scope="module")
def states(sequences):
    return training.head_states(MODEL, sequences, [1, 3, L], progress=False)


# -- self-generated text (row 26) --------------------------------------------------------------------------------------


def test_row_26_text_is_its_seed_and_stays_in_the_window(sequences):
    again = training.self_generate(MODEL, PROMPTS, tokens=150, window=WINDOW, seed=1, batch=3)
    other = training.self_generate(MODEL, PROMPTS, tokens=150, window=WINDOW, seed=2, batch=3)
    assert [one.tolist() for one in again.ids] == [one.tolist() for one in sequences.ids]
    assert [one.tolist() for one in other.ids] != [one.tolist() for one in sequences.ids]
    assert sequences.generated == 150
    assert max(map(len, sequences.ids)) <= WINDOW
    said = [0] * len(PROMPTS)
    for ids, start, prompt in zip(sequences.ids, sequences.starts, sequences.prompts, strict=True):
        assert ids[:start].tolist() == PROMPTS[prompt]
        new = ids[start:].tolist()
        assert new
        assert 2 not in new[:-1]  # nothing follows the end token
        said[prompt] += len(new)
    assert max(said) <= -(-150 // len(PROMPTS))


def test_row_26_no_prompt_is_on_both_sides_of_a_split(sequences):
    rest, held = sequences.split(0.5, seed=3)
    assert set(rest.prompts) & set(held.prompts) == set()
    assert len(set(rest.prompts)) == len(set(held.prompts)) == 2
    assert rest.generated + held.generated == 150
    with pytest.raises(RiskcalError, match=r"share: 0.01 of 4 prompts"):
        sequences.split(0.01)


def test_text_leaves_other_random_numbers_alone():
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    training.self_generate(MODEL, PROMPTS, tokens=4, window=WINDOW, seed=1)
    assert torch.equal(torch.rand(3), wanted)


def test_draws_are_from_the_whole_distribution():
    """Hugging Face keeps the 50 likeliest of the 60 tokens unless it is told otherwise.

    4,000 draws of the next token; a token of probability .005 comes less than 3 times with probability below 1e-6.
    """
    ids = torch.tensor([[5, 9]]).repeat(4_000, 1)
    drawn = self_generated.hugging_face(MODEL)(ids, torch.ones_like(ids), 1, 1.5, 7)[:, 0]
    with torch.no_grad():
        law = (MODEL(ids[:1]).logits[0, -1] / 1.5).softmax(-1)
    share = torch.bincount(drawn, minlength=V) / len(drawn)
    assert (law[law.argsort()[:10]].sum() * len(drawn)) > 20  # what a cut would lose
    assert share[law.argsort()[:10]].sum() > 0
    assert ((share - law).abs() <= 5 * (law * (1 - law) / len(drawn)).sqrt() + 1e-3).all()


def test_at_temperature_zero_text_is_greedy_generation():
    found = training.self_generate(MODEL, PROMPTS, tokens=40, window=WINDOW, temperature=0.0)
    for ids, start, prompt in zip(found.ids, found.starts, found.prompts, strict=True):
        given_ids = torch.tensor([PROMPTS[prompt]])
        with torch.no_grad():
            whole = MODEL.generate(given_ids, do_sample=False, max_new_tokens=10)[0].tolist()
        assert ids.tolist() == whole[: len(ids)]
        assert len(ids) - start == 10 or ids[-1] == 2


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: there is none"),
        ([[3], [V]], {}, f"row 1 holds {V}"),
        ([[3], []], {}, "row 1 has 0 tokens"),
        ([[3], [4] * 24], {}, "row 1 has 24 tokens, where window 24"),
        (["text"], {}, "row 0 is a text; give tokenizer="),
        ([[3]], {"temperature": -1.0}, "temperature: -1"),
        ([[3]], {"tokens": 0}, "tokens"),
    ],
)
def test_bad_prompts_are_refused(prompts, options, message):
    with pytest.raises(RiskcalError, match=message):
        training.self_generate(MODEL, prompts, window=WINDOW, **options)


def test_what_is_no_causal_model_is_refused():
    with pytest.raises(RiskcalError, match="Linear is no causal language model"):
        training.self_generate(torch.nn.Linear(2, 2), PROMPTS)


# -- losses and the ceiling (row 25) -----------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.sampled_from(["hard", "soft"]), st.sampled_from([0.0, 0.1, 0.95]))
@settings(max_examples=30)
def test_row_25_the_loss_is_its_formula(seed, kind, penalty):
    rng = np.random.default_rng(seed)
    logits, model = rng.normal(size=(2, 3, 7)) * 3
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    q = np.exp(model) / np.exp(model).sum(-1, keepdims=True)
    said = q.argmax(-1)
    target = training.head_targets(torch.tensor(q), torch.tensor(said), None, kind)
    cross = [
        -math.log(p[i, said[i]]) if kind == "hard" else -(q[i] @ np.log(p[i])) for i in range(3)
    ]
    entropy = -(p * np.log(p)).sum(-1)
    wanted = np.mean([(1 - penalty) * c - penalty * h for c, h in zip(cross, entropy, strict=True)])
    found = training.head_loss(torch.tensor(logits), target, penalty)
    assert found.item() == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_what_a_small_head_cannot_say_is_spread_over_what_it_can():
    probabilities = torch.tensor([[0.5, 0.1], [0.0, 0.0]])
    said, ids = torch.tensor([4, 9]), torch.tensor([4, 2])
    soft = training.head_targets(probabilities, said, ids, "soft")
    hard = training.head_targets(probabilities, said, ids, "hard")
    torch.testing.assert_close(soft, torch.tensor([[0.7, 0.3], [0.5, 0.5]]))
    torch.testing.assert_close(hard, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))


@pytest.mark.parametrize(
    ("vocabulary", "masses"),
    [(51_200, (0.753, 0.241, 0.114, 0.0164, 0.0086)), (200, (0.980, 0.456, 0.241, 0.048, 0.029))],
)
def test_row_25_the_ceiling_has_the_values_of_the_specification(vocabulary, masses):
    for penalty, mass in zip((0.1, 0.3, 0.5, 0.9, 0.95), masses, strict=True):
        exact = training.confidence_ceiling(vocabulary, penalty)
        assert exact == pytest.approx(mass, abs=1e-4 if mass < 0.02 else 1e-3)
        odds = math.log(exact * (vocabulary - 1) / (1 - exact))
        assert (1 - penalty) / exact == pytest.approx(penalty * odds)
    assert training.confidence_ceiling(vocabulary, 0.0) == 1.0


@pytest.mark.parametrize("penalty", [0.1, 0.5, 0.95])
def test_row_25_a_head_that_is_always_right_converges_to_the_ceiling(penalty):
    logits = torch.zeros(1, 50, requires_grad=True)
    target = torch.nn.functional.one_hot(torch.tensor([7]), 50).float()
    adam = torch.optim.Adam([logits], lr=0.1)
    for _ in range(400):
        adam.zero_grad()
        training.head_loss(logits, target, penalty).backward()
        adam.step()
    reached = logits.softmax(-1).max().item()
    assert reached == pytest.approx(training.confidence_ceiling(50, penalty), rel=0.01)


# -- what heads read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [MODEL, tiny_causal.gpt2()], ids=["llama", "gpt2"])
def test_states_are_those_before_the_tokens_that_were_generated(model, sequences):
    hooks = [len(module._forward_hooks) for module in model.modules()]
    found = training.head_states(model, sequences, [2, L], progress=False)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    ids, start = torch.tensor(sequences.ids[0])[None], int(sequences.starts[0])
    with torch.no_grad():
        whole = model(ids[:, :-1], output_hidden_states=True)
    logits, count = whole.logits[0, start - 1 :], ids.shape[1] - start
    torch.testing.assert_close(found.raw[2][:count], whole.hidden_states[2][0, start - 1 :])
    torch.testing.assert_close(found.final[:count], whole.hidden_states[-1][0, start - 1 :])
    assert torch.equal(found.said[:count], logits.argmax(-1))
    torch.testing.assert_close(found.log_norm[:count], logits.logsumexp(-1))
    copied = ExitHead.copied(model)
    assert training.head_answers(copied, found, L).agrees.all()
    assert len(found.said) == len(found.prompts) == sequences.generated
    assert found.mean_probability.sum().item() == pytest.approx(1.0, abs=1e-4)


def test_answers_are_those_of_the_head(states):
    head = ExitHead.small(MODEL, [4, 9, 2, 30])
    found = training.head_answers(head, states, 3)
    p = head.logits(states.raw[3]).softmax(-1)
    top = p.sort(-1, descending=True).values
    np.testing.assert_allclose(found.confidence, top[:, 0] - top[:, 1], atol=1e-6)
    np.testing.assert_allclose(found.entropy, -(p * p.log()).sum(-1), atol=1e-5)
    assert found.agrees.tolist() == (head.said(states.raw[3]) == states.said).tolist()


# -- training ----------------------------------------------------------------------------------------------------------

OPTIONS = {"steps": 40, "batch": 64, "learning_rate": 1e-2, "progress": False}


def mean_loss(heads, states, kind, penalty):
    teacher = MODEL.get_output_embeddings().weight.detach()
    every = torch.arange(len(states.said))
    return exit_heads._losses(heads, states, every, teacher, kind, penalty).sum().item()


@pytest.mark.parametrize(
    ("init", "rank", "vocabulary"),
    [("copy", None, None), ("fresh", None, 12), ("low_rank", 3, None), ("low_rank", 3, [4, 9, 2])],
)
@pytest.mark.parametrize(("kind", "penalty"), [("hard", 0.0), ("soft", 0.95)])
def test_training_lowers_the_loss_and_leaves_the_backbone(
    states, init, rank, vocabulary, kind, penalty
):
    before = {name: weight.clone() for name, weight in MODEL.state_dict().items()}
    trained = training.train_heads(
        MODEL,
        states,
        [1, 3],
        init=init,
        rank=rank,
        vocabulary=vocabulary,
        target=kind,
        entropy_penalty=penalty,
        **OPTIONS,
    )
    assert list(trained) == [1, 3]
    check_heads(trained, MODEL)
    ids = trained[1].ids
    assert (None if ids is None else len(ids)) == (
        vocabulary if vocabulary is None or isinstance(vocabulary, int) else len(vocabulary)
    )
    begun = {
        layer: exit_heads._begun(
            MODEL, init, rank, None if ids is None else ids.tolist(), seed=layer, backbone=""
        )
        for layer in trained
    }
    untrained = mean_loss(begun, states, kind, penalty)
    assert mean_loss(trained, states, kind, penalty) < untrained - 1e-3
    for name, weight in MODEL.state_dict().items():
        assert torch.equal(weight, before[name])
    assert trained[1].backbone == backbone_fingerprint(MODEL)


def test_row_25_the_penalty_raises_entropy(states):
    entropies = []
    for penalty in (0.0, 0.5, 0.95):
        trained = training.train_heads(
            MODEL, states, [3], target="hard", entropy_penalty=penalty, **OPTIONS
        )
        entropies.append(training.head_answers(trained[3], states, 3).entropy.mean())
    assert entropies[0] < entropies[1] < entropies[2]


def test_a_small_vocabulary_is_the_tokens_that_the_model_holds_likeliest(states):
    heads = training.train_heads(MODEL, states, [1], vocabulary=5, **OPTIONS | {"steps": 1})
    law = (states.final @ MODEL.get_output_embeddings().weight.detach().T).softmax(-1).mean(0)
    assert heads[1].ids.tolist() == sorted(law.argsort(descending=True)[:5].tolist())


def test_text_and_its_states_train_the_same_heads(sequences, states):
    options = OPTIONS | {"steps": 2}
    one = training.train_heads(MODEL, sequences, [1, 3], **options)
    other = training.train_heads(MODEL, states, [1, 3], **options)
    assert [head.fingerprint for head in one.values()] == [
        head.fingerprint for head in other.values()
    ]
    mean = training.train_heads(MODEL, states, [1, 3], combine="mean", **options)
    torch.testing.assert_close(mean[1].weight, one[1].weight, rtol=1e-3, atol=1e-3)


def test_training_that_was_cut_off_goes_on_to_the_same_heads(states, tmp_path, monkeypatch):
    options = OPTIONS | {"steps": 12, "save_steps": 5}
    whole = training.train_heads(MODEL, states, [1, L], **options)
    step = descent.Descent.step

    def cut_off(self, loss, number):
        if number == 8:
            raise KeyboardInterrupt
        step(self, loss, number)

    with monkeypatch.context() as patched:
        patched.setattr(descent.Descent, "step", cut_off)
        with pytest.raises(KeyboardInterrupt):
            training.train_heads(MODEL, states, [1, L], folder=tmp_path / "heads", **options)
    made = []

    def counted(self, loss, number):
        made.append(number)
        step(self, loss, number)

    monkeypatch.setattr(descent.Descent, "step", counted)
    # from the last that was saved; and a finished folder as it is
    for steps in ([*range(5, 12)], []):
        made.clear()
        heads = training.train_heads(MODEL, states, [1, L], folder=tmp_path / "heads", **options)
        assert made == steps
        assert [head.fingerprint for head in heads.values()] == [
            head.fingerprint for head in whole.values()
        ]
    for changed in ({"entropy_penalty": 0.1}, {"seed": 1}, {"steps": 13}, {"vocabulary": 5}):
        with pytest.raises(RiskcalError, match=r"in the training that .* holds"):
            training.train_heads(
                MODEL, states, [1, L], folder=tmp_path / "heads", **options | changed
            )
    (tmp_path / "heads" / "state.safetensors").write_bytes(b"no tensors")
    with pytest.raises(RiskcalError, match=r"cannot be read .* train again"):
        training.train_heads(MODEL, states, [1, L], folder=tmp_path / "heads", **options)


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([2], {}, r"layers: \[2\], and states were kept after \[1, 3, 4\]"),
        ([], {}, "layers: "),
        ([1], {"init": "none"}, "init"),
        ([1], {"target": "both"}, "target"),
        ([1], {"combine": "max"}, "combine"),
        ([1], {"init": "low_rank"}, "rank: None with init 'low_rank'"),
        ([1], {"rank": 3}, "rank: 3 with init 'copy'"),
        ([1], {"entropy_penalty": 1.0}, "entropy_penalty: 1 is not in"),
        ([1], {"learning_rate": 0.0}, "learning_rate: 0"),
        ([1], {"vocabulary": [V]}, f"ids: {V} at index 0"),
        ([1], {"learning_rate": 1e30}, "layer 1 became NaN or infinite"),
    ],
)
def test_bad_trainings_are_refused(states, layers, options, message):
    with pytest.raises(RiskcalError, match=message):
        training.train_heads(MODEL, states, layers, **OPTIONS | {"steps": 3} | options)


def test_a_layer_that_does_not_exist_is_refused(sequences):
    with pytest.raises(RiskcalError, match="5 is no layer of this model"):
        training.train_heads(MODEL, sequences, [1, 5], **OPTIONS)
