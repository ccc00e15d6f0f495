"""Policies of a learned risk, decoded by decoders that know nothing of it, and certified on what they then did."""

import numpy as np
import pandas as pd
import pytest

import riskcal
from riskcal.heads import learn_risk
from riskcal_adapters.texts import token_error_rate
from riskcal_adapters.torch import Engine, Request, load_example

WORDS = 60


@pytest.fixture(scope="module")
def traces():
    return riskcal.load_example("g2p-traces")


def test_generations_under_a_learned_risk_are_recorded_certified_and_served(tmp_path, traces):
    risk = learn_risk(traces, measure="softmax")
    decoder = load_example("g2p")
    words = risk.rest(traces).prompt
    words = list(dict.fromkeys(words.tolist()))[:WORDS]
    given = decoder.encode(words)
    full = decoder.decode(
        decoder.generate(*given, policy=riskcal.ExitPolicy.full_model(), max_new_tokens=24).tokens
    )
    rows = [{"prompt": w, "threshold": "full", "dissimilarity": 0.0, "layers": 8.0} for w in words]
    for max_risk in (0.02, 0.1):
        policy = risk.policy(max_risk, max_new_tokens=24)
        done = decoder.generate(*given, policy=policy)
        exits, confidence = done.exit_layers.numpy(), done.confidence.numpy()
        early = (exits > 0) & (exits < 8)
        assert early.any()
        at = np.full((early.sum(), 7), np.nan)
        at[np.arange(len(at)), exits[early] - 1] = confidence[early]
        assert (np.nanmax(risk.risk(at), axis=1) <= max_risk).all()
        for i, (text, word) in enumerate(zip(decoder.decode(done.tokens), words, strict=True)):
            loss = min(1.0, token_error_rate(text, full[i]))
            layers = exits[i][exits[i] > 0].mean()
            rows.append(
                {"prompt": word, **policy.to_columns(), "dissimilarity": loss, "layers": layers}
            )
    runs = riskcal.Runs.from_frame(pd.DataFrame(rows))
    found = riskcal.calibrate(runs, delta=0.25)
    policy = found.policy()
    assert found.certified
    assert (policy.measure, policy.max_new_tokens, policy.cache) == ("softmax", 24, "project")
    book = riskcal.serving.PolicyBook(
        {"bold": policy, "careful": risk.policy(0.02, max_new_tokens=24)}
    )
    engine = Engine(decoder, book, slots=8, max_prompt=24)
    tasks = ["bold", "careful"]
    served = {
        one.id: one
        for one in engine.run(Request(w, id=f"{w}-{t}", task=t) for w in words[:8] for t in tasks)
    }
    for task in tasks:  # rows of one batch may have risks of their own
        own = book.policies[task]
        alone = [
            decoder.generate(*decoder.encode([w]), policy=own).exit_layers[0].tolist()
            for w in words[:8]
        ]
        assert [served[f"{w}-{task}"].exit_layers.tolist() for w in words[:8]] == alone
    mixed = decoder.generate(*decoder.encode(words[:2]), policy=[book.policies[t] for t in tasks])
    assert mixed.exit_layers.shape[0] == 2
