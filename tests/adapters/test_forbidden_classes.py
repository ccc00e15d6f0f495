"""Tokens of forbidden classes never leave early, whatever shares their batch or slots, and a policy is certified with them."""

import functools

import numpy as np
import pytest
import torch
from causal_models import VOCABULARY, model, prompts
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import riskcal
import riskcal_adapters
from riskcal import ExitPolicy, RiskcalError, Runs, Sampling
from riskcal.forbidden import Guard
from riskcal.serving import EventLog, Inside, Pattern, PolicyBook, Tokens, read_events
from riskcal_adapters.torch import EarlyExitCausalLM, EarlyExitT5, Engine, Request, load_example
from riskcal_adapters.torch.engine import guarding

LENGTH, EARLY, LAST = 16, 2, 5
STRING, DIGIT = Inside("json_string"), Pattern(r"\d")


@functools.cache
def tokenizer():
    """Word by word: many that open, close and escape, some of them within one word."""
    words = ["<pad>", "<end>", "<start>", '"', '":', '\\"', "\\", "{", "}", "1", " 2x", "```", "`"]
    words += [f'{chr(97 + i)}"' if i % 2 else f" {chr(97 + i)}" for i in range(20)]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    of = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    of.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=of, pad_token="<pad>", eos_token="<end>")


@functools.cache
def decoder():
    return EarlyExitCausalLM(model("llama-grouped"), tokenizer())


def in_a_string(row):
    """Which tokens have a character in a JSON string, told from the text as a whole."""
    marked, inside, escaped = [], False, False
    for text in tokenizer().batch_decode(row[:, None], skip_special_tokens=True):
        touched = inside
        for character in text:
            quotes = character == '"' and not escaped
            escaped = inside and character == "\\" and not escaped
            inside ^= quotes
            touched |= inside
        marked.append(touched)
    return np.array(marked)


def generated(policy):
    generation = decoder().generate(*prompts(6), policy=policy, max_new_tokens=LENGTH)
    tokens, exits = generation.tokens.numpy(), generation.exit_layers.numpy()
    strings = np.array([in_a_string(row) for row in tokens])
    return exits, strings & (exits > 0), ~strings & (exits > 0)


def middling(**fields):
    traces = decoder().trace(*prompts(6), max_new_tokens=LENGTH)
    return ExitPolicy(threshold=float(np.quantile(traces.confidence[:, :-1], 0.6)), **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"batching": "regroup"},
        {"batching": "deepest"},
        {"cache": "deferred"},
        {"emits": "last"},
        {"sampling": Sampling(seed=5)},
        {"measure": "state"},
    ],
    ids=str,
)
def test_none_inside_a_json_string_exits_early(fields):
    exits, inside, outside = generated(ExitPolicy.static(EARLY, forbidden=[STRING], **fields))
    assert (exits[inside] == LAST).all()
    assert min(inside.sum(), (exits[outside] == EARLY).sum()) >= 5
    freely, inside, _ = generated(ExitPolicy.static(EARLY, **fields))
    assert (freely[inside] == EARLY).any()  # they would


def test_rows_of_one_batch_are_held_by_their_own_policies_and_texts():
    policies = [middling(forbidden=rules) for rules in ([], [STRING], [DIGIT, STRING])]
    ids, mask = prompts(6)
    policies = policies * 2
    together = decoder().generate(ids, mask, policies, max_new_tokens=LENGTH)
    for row, policy in enumerate(policies):
        alone = decoder().generate(ids[row : row + 1], mask[row : row + 1], policy, LENGTH)
        size = alone.tokens.shape[1]
        assert together.tokens[row, :size].tolist() == alone.tokens[0].tolist()
        assert together.exit_layers[row, :size].tolist() == alone.exit_layers[0].tolist()


def test_a_threshold_above_what_was_refused_generates_the_same():
    lower = middling(forbidden=[STRING])
    once = decoder().generate(*prompts(6), policy=lower, max_new_tokens=LENGTH)
    refused = once.refused[once.exit_layers > 0].max()
    assert refused < lower.threshold  # what was held at its token does not count
    above = ExitPolicy(
        threshold=float(np.nextafter(refused.numpy(), np.float32(np.inf))), forbidden=[STRING]
    )
    again = decoder().generate(*prompts(6), policy=above, max_new_tokens=LENGTH)
    assert torch.equal(once.tokens, again.tokens)
    assert torch.equal(once.exit_layers, again.exit_layers)


def test_slots_of_an_engine_hold_what_a_row_alone_does():
    ids, mask = prompts(9)
    given = [row[real.bool()].numpy() for row, real in zip(ids, mask, strict=True)]
    policy = middling(forbidden=[STRING, DIGIT])
    with Engine(decoder(), policy, slots=3, least=2, max_prompt=9, max_new_tokens=LENGTH) as engine:
        requests = [Request(id=str(i), input_ids=prompt) for i, prompt in enumerate(given)]
        done = sorted(engine.run(requests), key=lambda one: int(one.id))
    for prompt, one in zip(given, done, strict=True):
        alone = decoder().generate(
            torch.from_numpy(prompt)[None], policy=policy, max_new_tokens=LENGTH
        )
        assert one.error is None
        assert one.tokens.tolist() == alone.tokens[0].tolist()
        assert one.exit_layers.tolist() == alone.exit_layers[0].tolist()
        np.testing.assert_allclose(one.refused, alone.refused[0], atol=2e-5)


def test_a_prompt_that_the_output_continues_is_context_where_the_class_says_so():
    ids, mask = prompts(30)
    texts = [np.append(row[real.bool()], 6) for row, real in zip(ids, mask, strict=True)]
    opened = [in_a_string(text)[-1] for text in texts]  # where a backslash would follow the prompt
    assert 5 <= sum(opened) <= 25

    def exits(**asked):
        policy = ExitPolicy.static(EARLY, forbidden=[Inside("json_string", **asked)])
        return decoder().generate(ids, mask, policy=policy, max_new_tokens=1).exit_layers[:, 0]

    assert (exits(prompt=True)[opened] == LAST).all()
    assert (exits()[opened] == EARLY).any()


def test_traces_have_no_confidence_where_a_token_is_forbidden():
    policy = ExitPolicy(forbidden=[Tokens(range(0, VOCABULARY, 2))])
    free = decoder().trace(*prompts(4), max_new_tokens=LENGTH)
    held = decoder().trace(*prompts(4), max_new_tokens=LENGTH, policy=policy)
    early = held.confidence[:, :-1]
    assert 0.2 < np.isnan(early).mean() < 0.8
    assert np.array_equal(early[~np.isnan(early)], free.confidence[:, :-1][~np.isnan(early)])
    assert not np.isnan(held.confidence[:, -1]).any()


def test_without_a_tokenizer_texts_are_refused_and_ids_are_not(tmp_path):
    blind = EarlyExitCausalLM(model("llama-grouped"))
    by_text = ExitPolicy.static(EARLY, forbidden=[Tokens([3]), DIGIT])
    for ask in (blind.generate, blind.trace):
        with pytest.raises(RiskcalError, match=r"^forbidden: Pattern.*no tokenizer.*Tokens\(ids\)"):
            ask(*prompts(1), policy=by_text)
    every = ExitPolicy.static(EARLY, forbidden=[Tokens(range(VOCABULARY))])
    assert (blind.generate(*prompts(1), policy=every, max_new_tokens=3).exit_layers == LAST).all()
    log = EventLog(tmp_path / "events.jsonl")
    with Engine(blind, by_text, slots=1, max_new_tokens=3, events=log) as engine:
        [done] = engine.run([Request(input_ids=prompts(1)[0][0].numpy())])
    assert (done.exit_layers == LAST).all()
    told = [event["name"] for event in read_events(log.path).events]
    assert told == ["riskcal.policy.refused", "riskcal.request.served"]


def test_a_recording_with_classes_gives_a_policy_that_is_certified_with_them(tmp_path):
    rules = (Pattern("[12]$"),)  # stressed vowels
    own = load_example("g2p")
    words = [
        f"{a}{b}" for a in ("ro", "ta", "mi", "len", "gar") for b in ("ston", "bel", "kin", "o")
    ]
    riskcal_adapters.record(
        words,
        lambda: own,
        [0.3],
        tmp_path / "out",
        policy=ExitPolicy(forbidden=rules),
    )
    runs = Runs.read(tmp_path / "out")
    policy = riskcal.calibrate(runs, delta=0.9, epsilon=0.5, test="hoeffding").policy()
    assert policy.certificate is not None
    assert policy.forbidden == rules
    policy.save(tmp_path / "policy.json")
    assert ExitPolicy.load(tmp_path / "policy.json") == policy
    text = (tmp_path / "policy.json").read_text().replace("[12]$", "[12]")
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(RiskcalError, match="issued for other settings"):
        ExitPolicy.load(tmp_path / "policy.json")


# of these the table is forgotten now and then, when it has grown too
@pytest.mark.parametrize("entries", [4_000_000, 600, 12_000])
def test_all_rows_at_once_stand_where_each_would_alone(monkeypatch, entries):
    monkeypatch.setattr(guarding, "_ENTRIES_AT_MOST", entries)
    texts = ['"', "\\", '\\"', "1", "2x", "`", "```", "```a", "a", " ", "_b", "{", '":'] * 30

    def text(token):
        return texts[token]

    reads = Inside("code_identifier", prompt=True)
    several = [(), (STRING,), (STRING, DIGIT, Inside("code_block")), (reads, Tokens(ids=(3, 11)))]
    rng, slots = np.random.default_rng(0), 8
    together, alone = guarding.Guards(slots, text), [None] * slots
    left = held = 0
    for _ in range(600):
        for row in np.flatnonzero(rng.random(slots) < 0.05).tolist():
            rules, prompt = several[rng.integers(4)], rng.integers(0, len(texts), 3)
            together.begin(row, rules, prompt)
            guard = Guard(rules, text)
            alone[row] = guard, guard.start(prompt.tolist())
        rows = rng.permutation([row for row in range(slots) if alone[row]])[: rng.integers(1, 9)]
        tokens, early = rng.integers(0, len(texts), len(rows)), bool(rng.random() < 0.7)
        said = together.leave(rows, tokens, early=early)
        for i, (row, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
            guard, states = alone[row]
            leaves = not (early and guard.forbids(states, token))
            assert leaves == (said is None or said[i])
            if leaves:
                alone[row] = guard, guard.after(states, token)
            left, held = left + leaves, held + (not leaves)
    assert min(left, held) > 300


def test_a_table_that_has_grown_wide_can_be_forgotten(monkeypatch):
    monkeypatch.setattr(guarding, "_ENTRIES_AT_MOST", 2000)
    rules = (DIGIT, Tokens(ids=tuple(range(0, 5000, 3))))
    guards, alone, row = guarding.Guards(1, str), Guard(rules, str), np.array([0])
    guards.begin(0, rules, np.array([], dtype=np.int64))
    states, widths = alone.start([]), []
    for token in [*range(1500), *range(1500)]:
        left = guards.leave(row, np.array([token]), early=True)
        assert (left is None) != alone.forbids(states, token)
        if left is not None:
            guards.leave(row, np.array([token]), early=False)
        states = alone.after(states, token)
        widths.append(guards._table.shape[1])
    assert (np.diff(widths) < 0).any(), "nothing was ever forgotten"


def test_the_compiled_turn_holds_what_is_forbidden(gated_t5):
    own, rng = EarlyExitT5(gated_t5), np.random.default_rng(0)
    assert own._backbone.compiled
    rules = (Tokens(ids=tuple(range(0, own._backbone.vocabulary, 3))),)
    policies = {
        "held": ExitPolicy(threshold=0.05, forbidden=rules),
        "free": ExitPolicy(threshold=0.05),
        "deep": ExitPolicy(threshold=0.0, min_layer=2, forbidden=rules),
    }
    given = [rng.integers(2, own._backbone.vocabulary, rng.integers(1, 9)) for _ in range(36)]
    tasks = [list(policies)[i % 3] for i in range(36)]
    asked = [
        Request(input_ids=ids, id=str(i), task=task)
        for i, (ids, task) in enumerate(zip(given, tasks, strict=True))
    ]
    with Engine(own, PolicyBook(policies), slots=5, max_prompt=8, max_new_tokens=10) as engine:
        done = {int(one.id): one for one in engine.run(asked)}
    held = 0
    for i, (ids, task) in enumerate(zip(given, tasks, strict=True)):
        alone = own.generate(torch.from_numpy(ids)[None], policy=policies[task], max_new_tokens=10)
        size = len(done[i].tokens)
        assert done[i].tokens.tolist() == alone.tokens[0, :size].tolist()
        assert done[i].exit_layers.tolist() == alone.exit_layers[0, :size].tolist()
        np.testing.assert_allclose(done[i].confidence, alone.confidence[0, :size], atol=2e-5)
        np.testing.assert_allclose(done[i].refused, alone.refused[0, :size], atol=2e-5)
        forbidden = np.isin(done[i].tokens, rules[0].ids) & (task != "free")
        assert (done[i].exit_layers[forbidden] == own.n_layers).all()
        held += int(forbidden.sum())
    assert held >= 10
