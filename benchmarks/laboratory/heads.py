"""Populations of tokens at heads whose true agreement is known, for any thresholds."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Population:
    """Equally likely kinds of prompts, each with a length and equally likely kinds of tokens: C kinds of m tokens, K heads.

    The tokens of a prompt share its kind, and so depend on each other; given the kind they are independent.
    """

    lengths: NDArray[np.int64]  # (C,)
    confidence: Array  # (C, m, K)
    right: Array  # (C, m, K), probability that the head agrees

    @property
    def max_tokens(self) -> int:
        """Of the longest kind of prompt."""
        return int(self.lengths.max())

    @property
    def heads(self) -> int:
        """How many."""
        return int(self.confidence.shape[2])

    def draw(
        self, n: int, rng: np.random.Generator
    ) -> tuple[Array, NDArray[np.bool_], NDArray[np.intp]]:
        """Confidence (N, K), agreement (N, K) and prompt (N,) of n prompts."""
        kind = rng.integers(len(self.lengths), size=n)
        prompt = np.repeat(np.arange(n), self.lengths[kind])
        token = rng.integers(self.confidence.shape[1], size=len(prompt))
        right = self.right[kind[prompt], token]
        return self.confidence[kind[prompt], token], rng.random(right.shape) < right, prompt

    def truth(self, thresholds: Array, *, alone: bool = False) -> tuple[Array, Array]:
        """Share of all tokens that exit at each head, and their pooled agreement; each head alone, or in the cascade."""
        reached = self.confidence >= thresholds
        first = reached if alone else reached & (np.cumsum(reached, axis=2) == 1)
        weight = self.lengths[:, None, None] / (self.lengths.sum() * self.confidence.shape[1])
        share = (weight * first).sum((0, 1))
        with np.errstate(invalid="ignore"):
            return share, (weight * first * self.right).sum((0, 1)) / share

    def breaks(self, thresholds: Array, agreement: float, *, alone: bool = False) -> bool:
        """Whether the agreement of any head falls short; a head without exits cannot."""
        return bool((self.truth(thresholds, alone=alone)[1] < agreement - 1e-12).any())

    def saving(self, thresholds: Array) -> float:
        """Layers spared per token, as a share: heads equally far apart, the full model as far behind the last one."""
        share, _ = self.truth(thresholds)
        return float(share @ np.arange(self.heads, 0, -1)) / (self.heads + 1)

    def oracle(self, agreement: float) -> Array:
        """The most that thresholds save which keep the agreement: each choice of heads, each head as bold as it may be."""
        weight = np.repeat(self.lengths, self.confidence.shape[1]) / (
            self.lengths.sum() * self.confidence.shape[1]
        )
        confidence, right = (a.reshape(-1, self.heads) for a in (self.confidence, self.right))
        best, least = np.full(self.heads, np.inf), 0.0
        for used in itertools.product([False, True], repeat=self.heads):
            thresholds, waiting = np.full(self.heads, np.inf), np.ones(len(weight), dtype=bool)
            for k in np.flatnonzero(used):
                order = np.argsort(-confidence[waiting, k])
                level, mass = confidence[waiting, k][order], weight[waiting][order]
                agreed = np.cumsum(mass * right[waiting, k][order]) / np.cumsum(mass)
                feasible = np.flatnonzero(
                    (agreed >= agreement) & np.r_[level[1:] != level[:-1], True]
                )
                if feasible.size:
                    thresholds[k] = level[feasible[-1]]
                    waiting &= confidence[:, k] < thresholds[k]
            if self.saving(thresholds) > least:
                best, least = thresholds, self.saving(thresholds)
        return best


def independent(n_heads: int = 4, size: int = 40_000) -> Population:
    """One token per prompt, heads that know nothing of each other, errors that rise with the cube of the doubt."""
    confidence = np.random.default_rng(1).random((1, size, n_heads))
    doubt = 1 - confidence
    return Population(
        np.array([1]), confidence, 1 - 0.02 - np.linspace(0.8, 0.5, n_heads) * doubt**3
    )


def cascade(
    lengths: Sequence[int] = (5, 50), n_heads: int = 4, kinds: int = 400, size: int = 50
) -> Population:
    """Difficulty varies between prompts and tokens; deeper heads master more of it, and judge themselves with noise."""
    rng = np.random.default_rng(2)
    difficulty = 0.7 * rng.normal(size=(kinds, 1, 1)) + rng.normal(size=(kinds, size, 1))
    mastery = np.linspace(-0.2, 1.2, n_heads) - difficulty
    confidence = special.expit(2 * (mastery + 0.5 * rng.normal(size=mastery.shape)))
    return Population(
        np.resize(lengths, kinds), confidence, 1 - 0.9 * special.expit(-2 * mastery - 1)
    )
