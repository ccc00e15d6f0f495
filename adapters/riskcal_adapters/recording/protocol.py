"""What `record` asks of a decoder and of a pool: any object that offers these methods serves, whatever its framework."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from riskcal.policy import ExitPolicy
from riskcal.records import Traces


class Generation(Protocol):
    """What a decoder generated for a batch of B prompts; arrays of any framework that numpy can read.

    It may also offer ``refused`` (B, T): of each token the largest confidence that a layer looked at and that fell short of
    what the policy asked of it there, ``-inf`` where there was none, and where padded. A NaN confidence is left out. A lower
    threshold changes nothing until it reaches one of these, so that `record` generates the same tokens once. This is so for
    a decoder into which the threshold enters by that comparison alone.

    And ``failed`` (B,), true for each row that is no output: it ran into a time limit, came back empty, did not end. Such a row
    is recorded at the worst loss, and needs no tokens.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Mine:  # any object with these is one
    ...     tokens: np.ndarray
    ...     exit_layers: np.ndarray
    >>> generation = Mine(tokens=np.array([[5, 9, 1]]), exit_layers=np.array([[2, 8, 1]]))
    >>> riskcal.efficiency.exit_shares(generation.exit_layers, n_layers=8).round(2).tolist()
    [0.33, 0.33, 0.0, 0.0, 0.0, 0.0, 0.0, 0.33]
    """

    @property
    def tokens(self) -> Any:
        """(B, T) ids, padded after the end."""

    @property
    def exit_layers(self) -> Any:
        """(B, T) layer at which each token left the decoder, 1..L; 0 where padded."""


class Decoder(Protocol):
    """What `record` asks of a decoder. It must be deterministic, and a row must not depend on its batch.

    The exception is ``batching="deepest"``. A decoder may also offer what `riskcal_adapters.fingerprint.BINDING` names: policies
    are then bound to it, and a recording is not resumed with another model.

    Examples
    --------
    >>> from riskcal_adapters.torch import load_example
    >>> decoder = load_example("g2p")  # is one; a decoder of yours needs these
    >>> policy = riskcal.ExitPolicy(threshold=0.5)
    >>> generation = decoder.generate(*decoder.encode(["calm"]), policy=policy, max_new_tokens=24)
    >>> decoder.decode(generation.tokens), decoder.n_layers
    (['K AA M'], 8)
    """

    @property
    def n_layers(self) -> int:
        """Exit layers L; L is the full model."""

    def encode(self, texts: list[str]) -> tuple[Any, Any]:
        """``input_ids`` and ``attention_mask`` of a batch, padded."""

    def generate(
        self, input_ids: Any, attention_mask: Any, *, policy: ExitPolicy, max_new_tokens: int
    ) -> Generation:
        """Generate under one policy, greedily or as its ``sampling`` says."""

    def decode(self, tokens: Any) -> list[str]:
        """One text per row, without special tokens."""

    def trace(
        self,
        input_ids: Any,
        attention_mask: Any,
        *,
        max_new_tokens: int,
        prompts: list[Any],
        policy: ExitPolicy,
    ) -> Traces:
        """Confidence, as the policy's measure has it, and agreement of every layer along the full model's path.

        Only needed for ``traces=True``.
        """


class Pool(Protocol):
    """Anything that maps: process and thread pools, executors, ``ray.util.multiprocessing.Pool``."""

    def map(self, function: Callable[[Any], Any], iterable: Iterable[Any], /) -> Iterable[Any]:
        """Results, not futures."""
