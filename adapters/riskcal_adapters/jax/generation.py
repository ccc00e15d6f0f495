"""What the JAX decoder returns."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Generation:
    """What was generated for B prompts, on the host; T is the longest of the generations.

    Attributes
    ----------
    tokens : (B, T) int64
        Token ids, the end token included, the padding id after it.
    exit_layers : (B, T) int64
        Layer at which each token left the decoder, 1..L; 0 where padded.
    confidence : (B, T) float32
        Confidence at that layer; NaN where padded.
    refused : (B, T) float32
        The largest confidence at which the token might have exited earlier and did not; ``-inf`` where there was none. A
        threshold above all of a row's would have generated the very same.

    Examples
    --------
    >>> from riskcal_adapters.jax import load_example
    >>> decoder = load_example("g2p")
    >>> generation = decoder.generate(*decoder.encode(["calm"]), policy=riskcal.ExitPolicy(threshold=0.9))
    >>> generation.tokens.shape == generation.exit_layers.shape, str(generation.confidence.dtype)
    (True, 'float32')
    """

    tokens: NDArray[np.int64]
    exit_layers: NDArray[np.int64]
    confidence: NDArray[np.float32]
    refused: NDArray[np.float32]
