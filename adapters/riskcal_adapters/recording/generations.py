"""`generations`: a few prompts' tokens and exit layers at each threshold, for reports to colour."""

from typing import Any

import pandas as pd
from numpy.typing import ArrayLike

from riskcal.policy import ExitPolicy
from riskcal_adapters.recording.job import descending, length, template
from riskcal_adapters.recording.prompts import check_prompts
from riskcal_adapters.recording.protocol import Decoder
from riskcal_adapters.recording.runs import _numpy


def generations(
    prompts: Any,
    decoder: Decoder,
    thresholds: ArrayLike,
    *,
    policy: ExitPolicy | None = None,
    max_new_tokens: int | None = None,
) -> pd.DataFrame:
    """Generate with the full model and at each threshold, and keep each token's text and exit layer.

    Parameters
    ----------
    prompts : sequence of str, or table
        As in `record`; a dozen is as many as a page shows.
    decoder : Decoder
    thresholds : (k,)
        Finite; the full model is generated beside them.
    policy : ExitPolicy, optional
        What all thresholds share; default: softmax confidence.
    max_new_tokens : int, optional
        Default: the policy's, else 64.

    Returns
    -------
    DataFrame
        As `riskcal.report.write` takes it: ``prompt``, ``text``, ``threshold``, ``tokens`` (pieces of the text, which together
        are all of it; a token that adds none is empty) and ``exit_layers``.

    Examples
    --------
    >>> from riskcal_adapters import generations, torch
    >>> table = generations(["calm"], torch.load_example("g2p"), [0.5], max_new_tokens=24)
    >>> table[["threshold", "tokens"]].values.tolist()
    [[inf, ['K', ' AA', ' M', '']], [0.5, ['K', ' AA', ' M', '']]]
    """
    rows, checked = descending(thresholds), check_prompts(prompts)
    limit = length(max_new_tokens, policy)
    shared = template(policy, limit)
    full = ExitPolicy(sampling=shared.sampling, max_new_tokens=limit).named()
    policies = [full, *(shared.model_copy(update={"threshold": value}) for value in rows)]
    found = []
    for prompt in checked:
        encoded = decoder.encode([prompt.text])
        for one in policies:
            generation = decoder.generate(*encoded, policy=one, max_new_tokens=limit)
            exits = _numpy(generation.exit_layers)[0]
            layers = exits[exits > 0].tolist()
            found.append(
                {
                    "prompt": prompt.prompt,
                    "text": prompt.text,
                    "threshold": one.threshold,
                    "tokens": _pieces(decoder, generation.tokens, len(layers)),
                    "exit_layers": layers,
                }
            )
    return pd.DataFrame(found)


def _pieces(decoder: Decoder, tokens: Any, n: int) -> list[str]:
    """What each token adds to the text before it: a tokenizer's pieces alone would not say where spaces are."""
    before = [decoder.decode(tokens[:, :i])[0] for i in range(1, n + 1)]
    known = ["", *before]
    return [
        text[len(last) :] if text.startswith(last) else text
        for last, text in zip(known, before, strict=False)
    ]
