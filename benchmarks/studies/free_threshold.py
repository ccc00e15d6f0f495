"""FREE's estimate of the threshold of a single early exit, from how confident agreeing and disagreeing tokens were.

It carries *no guarantee*: nothing bounds what the outputs lose at the estimated threshold. Fix the threshold, record a grid
around it on other prompts, and let `riskcal.calibrate` certify one.

Source: Bae et al., Fast and Robust Early-Exiting Framework for Autoregressive Language Models (2023), adaptive threshold
estimator. The paper describes an expectation-maximisation; the released code overwrites the likelihood's part of it, so that
what runs, there and here, is a supervised fit: one beta distribution of the confidences of the tokens on which shallow and
deep model agree, one of the others.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from riskcal import RiskcalError, internal

Floats = NDArray[np.float64]

#: The thresholds to choose from.
GRID: Floats = np.linspace(0.3, 0.9, 10)
#: Beta densities may be infinite at 0 and 1: confidences are kept this far inside.
_EDGE = 1e-4
#: What a token weighs in the distribution of the other outcome: the released code's floor of responsibilities, 1e-4 to 0.2.
_OTHER = 1e-4 / (0.2 + 1e-4)


@dataclass(frozen=True)
class BetaMixture:
    """Two beta distributions of the confidence, of equal weight.

    Attributes
    ----------
    disagree, agree : (float, float)
        alpha and beta of the tokens on which the shallow model's token is not, or is, the deep model's. The defaults are where
        the estimate starts from.
    """

    disagree: tuple[float, float] = (1.0, 2.0)
    agree: tuple[float, float] = (2.0, 1.0)

    def agreement(self, confidence: ArrayLike) -> Floats:
        """Probability that a token of this confidence agrees, if agreeing is as frequent as not.

        Parameters
        ----------
        confidence : array_like
            In [0, 1].

        Returns
        -------
        array
            Of the same shape. The original does not weigh by how often tokens agree, so this is no calibrated probability.
        """
        c = np.clip(np.asarray(confidence, dtype=np.float64), _EDGE, 1.0 - _EDGE)
        odds: Floats = special.expit(_log_density(c, *self.agree) - _log_density(c, *self.disagree))
        return odds

    def threshold(self, agreement: float = 0.4) -> float:
        """The smallest of `GRID` from which on tokens agree with more than this probability; the largest if there is none.

        The released code counts how many of the ten agree enough, which is the same where agreement rises with confidence.
        Where it falls, that code takes the two outcomes for one another; here the threshold is the largest.

        Parameters
        ----------
        agreement : float
            zeta, in (0, 1).
        """
        wanted = internal.level(agreement, "agreement")
        enough = np.logical_and.accumulate((self.agreement(GRID) > wanted)[::-1])[::-1]
        return float(GRID[np.argmax(enough)] if enough.any() else GRID[-1])


def fit(confidence: ArrayLike, agrees: ArrayLike) -> BetaMixture:
    """Fit both distributions by their moments.

    Parameters
    ----------
    confidence : (N,)
        Of the shallow model's tokens, in [0, 1].
    agrees : (N,)
        Whether the deep model's token is the same: booleans, or 0 and 1.

    Returns
    -------
    BetaMixture
        As in the released code each token also counts, 2,000 times less, for the other outcome, so that an outcome that was
        never seen gets the moments of all tokens. If all confidences are equal (those within 1e-4 of 0, or of 1, are),
        the starting values; the released code divides by zero there.

    Raises
    ------
    RiskcalError
        For arrays that do not fit, are empty, or hold other values.
    """
    c, right = _tokens(confidence, agrees)
    if c.min() == c.max():
        return BetaMixture()
    return BetaMixture(
        *(_moments(c, np.where(own, 1.0 - _OTHER, _OTHER)) for own in (~right, right))
    )


def threshold(confidence: ArrayLike, agrees: ArrayLike, *, agreement: float = 0.4) -> float:
    """The estimated threshold; see `fit` and `BetaMixture.threshold`. Without a guarantee.

    Parameters
    ----------
    confidence, agrees : (N,)
        As in `fit`.
    agreement : float
        zeta, in (0, 1).

    Returns
    -------
    float
        One of ten, 0.3 to 0.9; the largest if no token agrees, of which the released code makes the smallest.
    """
    mixture = fit(confidence, agrees)
    return mixture.threshold(agreement) if np.any(agrees) else float(GRID[-1])


def running_thresholds(
    confidence: ArrayLike,
    agrees: ArrayLike,
    prompts: ArrayLike,
    *,
    agreement: float = 0.4,
    updates: int = 300,
) -> Floats:
    """The threshold after each prompt, as FREE adapts it while it serves: without a guarantee, and moving.

    Parameters
    ----------
    confidence, agrees : (N,)
        As in `fit`, in the order of serving.
    prompts : (N,)
        Each token's prompt; the tokens of a prompt stand together.
    agreement : float
        zeta, in (0, 1).
    updates : int
        Prompts after which the threshold stays. Each update is a fit to all tokens so far.

    Returns
    -------
    (P,)
        One threshold per prompt, for the prompts that follow it.
    """
    c, right = _tokens(confidence, agrees)
    ids = np.asarray(prompts)
    if ids.shape != c.shape:
        raise RiskcalError(f"prompts: has shape {ids.shape}; give one id per token, {c.shape}.")
    ends = np.append(np.flatnonzero(ids[1:] != ids[:-1]) + 1, c.size)
    if len(np.unique(ids)) < ends.size:
        raise RiskcalError(
            "prompts: the tokens of a prompt stand apart; give them in the order of serving."
        )
    moving = [
        threshold(c[:end], right[:end], agreement=agreement)
        for end in ends[: internal.count(updates, "updates", least=1)]
    ]
    return np.array(moving + moving[-1:] * (ends.size - len(moving)))


def _tokens(confidence: ArrayLike, agrees: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    c = internal.array(confidence, "confidence", ndim=(1,))
    internal.in_range(c, "confidence", 0.0, 1.0)
    right = internal.array(agrees, "agrees", ndim=(1,))
    if (bad := (right != 0) & (right != 1)).any():
        raise RiskcalError(
            f"agrees: {right[bad][0]:g} at index {internal.first(bad)}; give booleans, or 0 and 1."
        )
    if c.shape != right.shape:
        raise RiskcalError(f"agrees: has shape {right.shape}; give one per confidence, {c.shape}.")
    return np.clip(c, _EDGE, 1.0 - _EDGE), right == 1


def _moments(confidence: Floats, weights: Floats) -> tuple[float, float]:
    """Alpha and beta with this mean and variance; both above 0, as what lies inside (0, 1) varies less than mean (1 - mean)."""
    mean = float(np.average(confidence, weights=weights))
    variance = float(np.average((confidence - mean) ** 2, weights=weights))
    total = mean * (1.0 - mean) / variance - 1.0
    return mean * total, (1.0 - mean) * total


def _log_density(confidence: Floats, alpha: float, beta: float) -> Floats:
    powers = special.xlogy(alpha - 1.0, confidence) + special.xlog1py(beta - 1.0, -confidence)
    return np.asarray(powers - special.betaln(alpha, beta), dtype=np.float64)
