"""How much of the vocabulary a pruned head still looks at, layer by layer."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate


@dataclass(frozen=True)
class Pruning:
    """A head that looks at the whole vocabulary once, at the first exit layer s, and then at the likeliest tokens only.

    At layer s the V tokens are ranked by their logits; the first k(s) of them are kept. Later layers compare the first k(i)
    of that ranking and no others. Confidences over fewer tokens are larger: a threshold belongs to its pruning.

    Parameters
    ----------
    form : {"fixed", "decaying", "adaptive", "adaptive-code"}
        ``"fixed"``: k(s) at every layer. ``"decaying"``: k(i) falls with the layer. ``"adaptive"``: k(s) shrinks with the
        confidence c of the layer before, ``max(smallest, floor(k(s) (1 - 0.9 c)))``. ``"adaptive-code"``: as the authors'
        code has it, ``floor(V (1 - 0.9 c))``, which for a small k(s) never binds.
    largest, smallest : int
        k1 and k* of ``k(i) = max(k*, floor(k1 / (1 + (k1 - k*) / k* * i / L)))``, in tokens; never more than V are kept.
        The defaults are the authors', for a vocabulary of 32,128.

    Notes
    -----
    The decaying form is the closed formula, not the recursion that its description suggests. k(i) counts the likeliest
    tokens: the authors' code sorts the ranking by token id before cutting it, and so keeps the lowest ids.

    Examples
    --------
    >>> pruning = riskcal.Pruning(form="decaying", largest=10_000, smallest=250)
    >>> [int(pruning.kept(layer, n_layers=8, vocabulary=32_128, start=1)) for layer in (2, 4, 8)]
    [930, 487, 250]
    >>> riskcal.ExitPolicy(threshold=0.8, pruning=pruning).pruning.form
    'decaying'
    """

    form: Literal["fixed", "decaying", "adaptive", "adaptive-code"] = "decaying"
    largest: int = 35_000
    smallest: int = 250
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _validate.choice(self.form, "form", ("fixed", "decaying", "adaptive", "adaptive-code"))
        _validate.count(self.smallest, "smallest", least=2)
        _validate.count(self.largest, "largest", least=self.smallest)

    def kept(
        self,
        layer: int,
        n_layers: int,
        vocabulary: int,
        *,
        start: int,
        confidence: ArrayLike | None = None,
    ) -> NDArray[np.int64]:
        """Tokens compared at a layer after the first exit layer, or kept at it.

        Parameters
        ----------
        layer, n_layers : int
            The exit layer i, from 1, and L.
        vocabulary : int
            V.
        start : int
            The first exit layer s.
        confidence : array_like, optional
            Confidence at the layer before, needed by the adaptive forms after layer s: at most 1; what is below 0 counts as
            0, and NaN too.

        Returns
        -------
        int64 array
            Of the shape of ``confidence`` (0-d without), at least 2 (where V is) and never above the number kept at ``start``.
        """
        first = self._formula(start, n_layers, vocabulary)
        shape = np.shape(confidence) if confidence is not None else ()
        if self.form == "fixed" or layer <= start:
            return np.full(shape, first)
        if self.form == "decaying":
            return np.full(shape, self._formula(layer, n_layers, vocabulary))
        if confidence is None:
            raise _validate.RiskcalError(
                "confidence: is missing; adaptive pruning needs that of the layer before."
            )
        sure = np.clip(np.nan_to_num(np.asarray(confidence, dtype=np.float64)), 0.0, 1.0)
        if self.form == "adaptive":
            shrunk, least = np.floor(first * (1.0 - 0.9 * sure)), min(self.smallest, first)
        else:
            # a margin takes two
            shrunk, least = np.floor(vocabulary * (1.0 - 0.9 * sure)), min(2, first)
        return np.clip(shrunk, least, first).astype(np.int64)

    def _formula(self, layer: int, n_layers: int, vocabulary: int) -> int:
        steepness = (self.largest - self.smallest) / self.smallest
        return min(
            vocabulary,
            max(self.smallest, math.floor(self.largest / (1.0 + steepness * layer / n_layers))),
        )
