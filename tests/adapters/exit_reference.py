"""Early-exit decoding by the definition: one prompt at a time, in float64, and every step runs all layers.

Which layer a token leaves at, what is emitted and what later tokens see of it is decided afterwards, from the states of all
layers. Slow, and without any of the decoder's shortcuts: pruning is a mask, contrasts are loops over tokens.
"""

import copy
import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from t5_reference import LENGTH, attention, heads, prompts

from riskcal import ExitPolicy
from riskcal_adapters.torch import EarlyExitT5
from riskcal_adapters.torch.confidence import Judge
from riskcal_adapters.torch.heads import of as head_of
from riskcal_adapters.torch.scores import Scores


@dataclass
class Row:
    """One prompt on its way."""

    memory: torch.Tensor
    last: int
    keys: list = field(default_factory=list)  # [position][layer] -> (1, heads, 1, d_kv)
    values: list = field(default_factory=list)
    tokens: list = field(default_factory=list)
    exits: list = field(default_factory=list)
    confidences: list = field(default_factory=list)
    refused: list = field(default_factory=list)
    pending: int = 0


class Reference:
    """Decodes with a T5; ``classifier`` as for the decoder."""

    def __init__(self, model, classifier=None):
        self.model = copy.deepcopy(model).double().eval()
        self.n_layers = model.config.num_decoder_layers
        self.vocabulary = model.config.vocab_size
        self.classifier = classifier

    @torch.inference_mode()
    def generate(self, prompts, policy, length=LENGTH):
        """Rows, decoded; with batching "deepest" they exit together, else each as if alone."""
        policy = policy.named()
        start = self.model.config.decoder_start_token_id
        rows = [
            Row(self.model.encoder(input_ids=prompt[None]).last_hidden_state, start)
            for prompt in prompts
        ]
        for position in range(length):
            thresholds = needed(policy, self.n_layers, position)
            going = [row for row in rows if not self.ended(row)]
            steps = [self.full_step(row) for row in going]
            seen = [
                self.judged(policy, row, thresholds, states)
                for row, (states, *_) in zip(going, steps, strict=True)
            ]
            depths = [self.first_passing(exits) for exits in seen]
            if policy.batching == "deepest" and going:
                depths = [max(depths)] * len(going)
            for row, step, exits, depth in zip(going, steps, seen, depths, strict=True):
                self.commit(policy, row, step, exits, depth)
        return rows

    def ended(self, row):
        ends = np.atleast_1d(self.model.generation_config.eos_token_id).tolist()
        return bool(row.tokens) and row.tokens[-1] in ends

    def full_step(self, row):
        """States (L + 1 of them, (d,)) of a step on the row's history, and its keys and values per layer."""
        decoder, config, position = self.model.decoder, self.model.config, len(row.tokens)
        state = decoder.embed_tokens(torch.tensor([[row.last]]))
        bias = (
            decoder.block[0]
            .layer[0]
            .SelfAttention.compute_bias(position + 1, position + 1)[:, :, -1:]
        )
        states, keys, values = [state], [], []
        for i, block in enumerate(decoder.block):
            own, cross = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
            key, value = self.projected(i, state)
            keys.append(key)
            values.append(value)
            history = [
                torch.cat([p[i] for p in of] + [new], 2)
                for of, new in ((row.keys, key), (row.values, value))
            ]
            query = heads(own.q(block.layer[0].layer_norm(state)), config)
            state = state + own.o(attention(query, *history, bias))
            query = heads(cross.q(block.layer[1].layer_norm(state)), config)
            prompt = [heads(linear(row.memory), config) for linear in (cross.k, cross.v)]
            state = block.layer[2](state + cross.o(attention(query, *prompt, 0.0)))
            states.append(state)
        return states, keys, values

    def projected(self, index, state):
        block = self.model.decoder.block[index]
        own, normed = block.layer[0].SelfAttention, block.layer[0].layer_norm(state)
        return heads(own.k(normed), self.model.config), heads(own.v(normed), self.model.config)

    def logits(self, state):
        """(V,) of any layer's state."""
        config = self.model.config
        normed = self.model.decoder.final_layer_norm(state)
        scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        return self.model.lm_head(normed * scale)[0, 0].numpy()

    def judged(self, policy, row, thresholds, states):
        """{layer: (confidence, threshold, logits with -inf for what pruning took away)}, of the layers that are looked at."""
        forced = policy.max_pending is not None and row.pending >= policy.max_pending
        looked = (
            [] if forced else [i + 1 for i in range(self.n_layers - 1) if thresholds[i] != math.inf]
        )
        looked.append(self.n_layers)
        target = self.logits(states[-1]).argmax()
        judged, order, before = {}, None, None
        for layer in looked:
            logits, kept = self.logits(states[layer]), np.arange(self.vocabulary)
            if policy.pruning is not None and policy.measure not in ("state", "classifier"):
                if order is None:
                    order = np.argsort(-logits, kind="stable")
                else:
                    kept = order[
                        : tokens_kept(
                            policy.pruning, layer, looked[0], self.n_layers, self.vocabulary, before
                        )
                    ]
            compared = only(logits, kept)
            if policy.measure == "state":
                before = cosine(states[layer], states[layer - 1]) if layer > 1 else 0.0
            elif policy.measure == "classifier":
                score = states[layer].flatten() @ self.classifier.weight.double().flatten()
                before = 1 / (1 + math.exp(-float(score + self.classifier.bias.double())))
            elif policy.measure == "oracle":
                before = float(compared.argmax() == target)
            elif policy.measure in OF_LOGITS:
                before = OF_LOGITS[policy.measure](compared)
            else:
                amateurs = {m: only(self.logits(states[m]), kept) for m in range(1, layer)}
                before = contrast(
                    policy.measure, policy.contrast, layer, looked[0], compared, amateurs
                )
            judged[layer] = before, thresholds[layer - 1], compared
        return judged

    def first_passing(self, judged):
        passing = [
            layer for layer, (confidence, threshold, _) in judged.items() if confidence >= threshold
        ]
        return min([*passing, self.n_layers])

    def commit(self, policy, row, step, judged, depth):
        states, keys, values = step
        confidence, _, compared = judged[depth]
        emitted = self.logits(states[-1]) if policy.emits == "last" else compared
        for i in range(depth, self.n_layers):
            if policy.cache == "project":
                keys[i], values[i] = self.projected(i, states[depth])
            elif policy.cache == "first":
                keys[i], values[i] = self.projected(i, states[1])
            elif policy.cache == "copy":
                keys[i], values[i] = keys[depth - 1], values[depth - 1]
        row.keys.append(keys)
        row.values.append(values)
        row.last = int(emitted.argmax())
        row.tokens.append(row.last)
        row.exits.append(depth)
        row.confidences.append(confidence)
        row.refused.append(
            max([c for layer, (c, *_) in judged.items() if layer < depth], default=-math.inf)
        )
        row.pending = 0 if depth == self.n_layers else row.pending + 1


def needed(policy, n_layers, position):
    """The confidence needed at each layer; position 0 is the first generated token (CALM, Eq. 5, and its code's form)."""
    given = policy.thresholds or {}
    table = []
    for layer in range(1, n_layers):
        value = policy.threshold if policy.thresholds is None else given.get(layer, math.inf)
        if layer < policy.min_layer or value == math.inf:
            value = math.inf
        elif policy.schedule.kind == "decaying":
            decay = math.exp(-policy.schedule.temperature * position / policy.schedule.max_length)
            paper = policy.schedule.form == "paper"
            value = (
                min(max(0.9 * value + 0.1 * decay, 0.0), 1.0)
                if paper
                else value * (0.9 + 0.1 * decay)
            )
        table.append(value)
    return [*table, -math.inf]


def only(logits, kept):
    masked = np.full(len(logits), -math.inf)
    masked[kept] = logits[kept]
    return masked


def tokens_kept(pruning, layer, start, n_layers, vocabulary, confidence):
    """k at a layer, by early_exit formulas: k(i) = max(k*, floor(k1 / (1 + (k1 - k*) / k* * i / L)))."""

    def formula(i):
        k1, least = pruning.largest, pruning.smallest
        return min(
            vocabulary, max(least, math.floor(k1 / (1 + (k1 - least) / least * i / n_layers)))
        )

    first = formula(start)
    if pruning.form == "fixed":
        return first
    if pruning.form == "decaying":
        return formula(layer)
    share = 1 - 0.9 * min(max(confidence, 0.0), 1.0)
    if pruning.form == "adaptive-code":
        return min(first, max(2, math.floor(vocabulary * share)))
    return min(first, max(pruning.smallest, math.floor(first * share)))


def softmax(logits):
    weights = np.exp(np.float64(logits) - np.max(logits))
    return weights / weights.sum()


def lead(scores):
    """The largest of some numbers less the next."""
    *_, second, first = sorted(scores)
    return first - second


def cosine(state, before):
    a, b = (np.float64(x).flatten() for x in (state, before))
    lengths = math.sqrt((a * a).sum()) * math.sqrt((b * b).sum())
    return float((a * b).sum() / lengths) if lengths else 0.0


OF_LOGITS = {
    "softmax": lambda logits: lead(softmax(logits)),
    "max": lambda logits: softmax(logits).max(),
    "entropy": lambda logits: sum(p * math.log(p) for p in softmax(logits) if p > 0),
}


def jensen_shannon(p, q):
    """In nats, of numbers that need not add up to 1."""
    return sum(
        x * math.log(2 * x / (x + y)) / 2
        for x, y in [*zip(p, q, strict=True), *zip(q, p, strict=True)]
        if x > 0
    )


def candidates(measure, layer, first):
    """Layers that may serve as the amateur of a layer."""
    if measure.startswith("jsd"):
        return list(range(2 if measure == "jsd-code" else max(2, first), layer))
    return [layer // 2] if layer >= 2 else []


def amateur_of(measure, layer, first, p, amateurs, plausible):
    """The amateur of a layer, None if it has none; p (V,) are its probabilities, ``amateurs`` logits by layer."""
    best, chosen = -math.inf, None
    for m in candidates(measure, layer, first):
        distance = jensen_shannon(p[plausible], softmax(amateurs[m])[plausible]) / (layer - m)
        if distance > best:
            best, chosen = distance, m
    return chosen


def contrast(measure, settings, layer, first, logits, amateurs):
    """A contrastive confidence, token by token."""
    p = softmax(logits)
    if settings.plausible == "kept":
        plausible = [x for x in range(len(p)) if logits[x] > -math.inf]
    else:
        alpha = settings.alpha
        if settings.alpha_decay:
            alpha = alpha / (1 + settings.alpha_decay * layer) * (1 - lead(p))
        plausible = [x for x in range(len(p)) if logits[x] > -math.inf and p[x] >= alpha * p.max()]
    m = amateur_of(measure, layer, first, p, amateurs, plausible)
    if m is None:
        return lead(p)
    q = softmax(amateurs[m])
    ratios = [p[x] / q[x] for x in plausible]
    mass = 1.0 if measure.endswith("-code") else sum(p[x] for x in plausible)
    scores = np.zeros(len(p)) if measure == "weighted" else p.copy()
    scores[plausible] = [mass * ratio / sum(ratios) for ratio in ratios]
    return lead(scores)


def assert_agrees(
    model, policy, *, classifier=None, batch=3, side="right", length=LENGTH, seed=0, tolerance=1e-5
):
    """The decoder, on a padded batch, gives what the definition gives; returns the exits, for a test to see them vary."""
    input_ids, mask = prompts(batch, side, seed)
    decoder = EarlyExitT5(model, classifier=classifier)
    generation = decoder.generate(input_ids, mask, policy=policy, max_new_tokens=length)
    return assert_same(
        generation, expected(model, policy, classifier, batch, side, length, seed), tolerance
    )


def expected(model, policy, classifier=None, batch=3, side="right", length=LENGTH, seed=0):
    input_ids, mask = prompts(batch, side, seed)
    real = [row[keep.bool()] for row, keep in zip(input_ids, mask, strict=True)]
    return Reference(model, classifier).generate(real, policy, length)


def assert_same(generation, rows, tolerance=1e-5):
    for i, row in enumerate(rows):
        size = len(row.tokens)
        assert generation.tokens[i, :size].tolist() == row.tokens
        assert generation.exit_layers[i, :size].tolist() == row.exits
        assert not generation.exit_layers[i, size:].any()
        np.testing.assert_allclose(
            generation.confidence[i, :size], row.confidences, rtol=0, atol=tolerance
        )
        np.testing.assert_allclose(
            generation.refused[i, :size], row.refused, rtol=0, atol=tolerance
        )
    return [layer for row in rows for layer in row.exits]


#: A linear exit classifier for the tiny models, neither always nor never sure.
CLASSIFIER = SimpleNamespace(
    weight=torch.randn(32, generator=torch.Generator().manual_seed(1)) * 0.05,
    bias=torch.tensor(0.1),
)


def judging(backbone, policy):
    """A judge with the head that its policy asks for."""
    return Judge(head_of(policy, backbone), policy)


class StubBackbone:
    """What a head needs of a backbone, with a matrix (d, V) of one's own and no norm."""

    def __init__(self, head, n_layers):
        self.head, self.n_layers, self.vocabulary = head, n_layers, head.shape[1]
        self.head_by_token = head.t().contiguous()

    def logits(self, state):
        return state @ self.head

    def scores(self, layer, state):
        return Scores(self.logits(state))

    def normed(self, state):
        return state

    def tensor(self, values):
        return torch.from_numpy(values)


def truncated(model, n_layers):
    """The model with its decoder cut off after ``n_layers`` layers."""
    cut = copy.deepcopy(model)
    cut.decoder.block = cut.decoder.block[:n_layers]
    cut.config.num_decoder_layers = cut.decoder.config.num_layers = n_layers
    return cut


def middling(model, quantile=0.75, **fields):
    """A policy at whose threshold some tokens exit early and some late: it is a quantile of early layers' confidences."""
    if fields.get("measure") == "oracle":
        return ExitPolicy(threshold=1.0, **fields)
    template = ExitPolicy(**fields)
    decoder = EarlyExitT5(
        model, classifier=CLASSIFIER if template.measure == "classifier" else None
    )
    traces = decoder.trace(*prompts(3), max_new_tokens=4, policy=template)
    early = np.asarray(traces.confidence)[:, fields.get("min_layer", 1) - 1 : -1]
    return template.model_copy(update={"threshold": float(np.quantile(early, quantile)) + 1e-4})
