"""Real early-exit decoding of many prompts under many policies: what the recipes report of a model."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
from rapidfuzz.distance import Levenshtein

from riskcal import ExitPolicy

if TYPE_CHECKING:
    from riskcal_adapters.recording import Decoder

THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def static_and_adaptive(n_layers: int) -> dict[str, ExitPolicy]:
    """The full model, every static exit, and a range of thresholds, by name."""
    static = {f"static {k}": ExitPolicy(thresholds={k: 0.0}) for k in range(1, n_layers)}
    adaptive = {f"threshold {value:g}": ExitPolicy(threshold=value) for value in THRESHOLDS}
    return {"full model": ExitPolicy.full_model()} | static | adaptive


def decode_policies(
    decoder: "Decoder",
    prompts: Sequence[str],
    policies: Mapping[str, ExitPolicy],
    errors: Callable[[Sequence[str]], dict[str, float]],
    max_new_tokens: int,
    *,
    split: Callable[[str], Sequence[str]] = list,
    batch_size: int = 128,
) -> pd.DataFrame:
    """Errors and depth of each policy; the first one must be the full model.

    Returns
    -------
    DataFrame
        ``policy``; the columns of ``errors``; ``distance``: mean normalised edit distance to the first policy's output, in
        the units of ``split``; ``layers``: mean exit layer over generated tokens.
    """
    rows = []
    reference: list[str] | None = None
    for name, policy in policies.items():
        outputs: list[str] = []
        depth = tokens = 0
        for start in range(0, len(prompts), batch_size):
            encoded = decoder.encode(prompts[start : start + batch_size])
            generation = decoder.generate(*encoded, policy=policy, max_new_tokens=max_new_tokens)
            outputs += decoder.decode(generation.tokens)
            depth += int(generation.exit_layers.sum())
            tokens += int((generation.exit_layers > 0).sum())
        reference = outputs if reference is None else reference
        distances = [
            Levenshtein.normalized_distance(split(output), split(whole))
            for output, whole in zip(outputs, reference, strict=True)
        ]
        rows.append(
            {
                "policy": name,
                **errors(outputs),
                "distance": sum(distances) / len(distances),
                "layers": depth / tokens,
            }
        )
    return pd.DataFrame(rows)
