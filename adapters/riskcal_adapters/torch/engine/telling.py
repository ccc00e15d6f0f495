"""What an event tells of a request beside its answer: what may drift, and its tokens by class."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from riskcal import RiskcalError
from riskcal.forbidden import Guard, Rule
from riskcal.internal import shown
from riskcal.serving.events import quoted
from riskcal_adapters.torch.caches import Ints
from riskcal_adapters.torch.decoder import Decoder
from riskcal_adapters.torch.engine.requests import Done, Flight

#: Tokens of no class that was named.
OTHER = "other"


class Telling:
    """What is told of the requests of one decoder.

    Parameters
    ----------
    decoder : EarlyExitT5 or EarlyExitCausalLM
    classes : mapping of str to Inside, Tokens or Pattern
        By which tokens are counted: a token is of the first that holds it, judged on the output so far and the token.

    Raises
    ------
    RiskcalError
        For names that are no text, or ``"other"``, and for classes that are none.
    """

    def __init__(self, decoder: Decoder, classes: Mapping[str, Rule] | None) -> None:
        self._weights = f'"riskcal.weights": {quoted(decoder.weights)}'
        self._guards: dict[str, Guard] = {}
        for name, rule in (classes or {}).items():
            if not isinstance(name, str) or not name or name == OTHER:
                raise RiskcalError(
                    f"classes: {shown(name)} is no name for a class; give text other than {OTHER!r}."
                )
            if not isinstance(rule, Rule):
                raise RiskcalError(
                    f"classes: {shown(rule)} of {name!r} is no class of tokens; give riskcal.serving.Inside, Tokens or Pattern."
                )
            self._guards[name] = Guard((rule,), decoder.loop.text)

    def served(self, flight: Flight, done: Done) -> str:
        """Of a request that has an output, as `Encoded` has it: this is done for every request, and outputs are short."""
        told = (
            f'"riskcal.seconds": {done.seconds!r}, "gen_ai.usage.output_tokens": {len(done.tokens)}, '
            f'"gen_ai.request.temperature": {float(flight.temperature)!r}, {self._weights}, '
            f'"riskcal.exit.layers": {_counted(done.exit_layers)}'
        )
        if flight.prompt is not None:
            told = f'{told}, "gen_ai.usage.input_tokens": {len(flight.prompt)}'
        sure = _mean(done.confidence)
        if sure is not None:
            told = f'{told}, "riskcal.confidence": {sure!r}'
        if not self._guards:
            return told
        classes = self._classes(flight, done.tokens)
        counts = [
            f"{quoted(name)}: {_counted(done.exit_layers[classes == i])}"
            for i, name in enumerate(self._names)
        ]
        return f'{told}, "riskcal.exit.classes": {{{", ".join(counts)}}}'

    def compared(self, flight: Flight, served: Done, full: Done) -> dict[str, Any]:
        """Of a shadow: by class, how many served tokens are not the full model's at their place, and how many there are."""
        if not self._guards:
            return {}
        classes = self._classes(flight, served.tokens)
        apart = np.ones(len(served.tokens), dtype=bool)
        both = min(len(served.tokens), len(full.tokens))
        apart[:both] = served.tokens[:both] != full.tokens[:both]
        pairs = {
            name: [int(apart[classes == i].sum()), int((classes == i).sum())]
            for i, name in enumerate(self._names)
        }
        return {"riskcal.token.classes": {name: pair for name, pair in pairs.items() if pair[1]}}

    @property
    def _names(self) -> list[str]:
        return [*self._guards, OTHER]

    def _classes(self, flight: Flight, tokens: Ints) -> Ints:
        """Each token's class, by its place among the names."""
        prompt = [] if flight.prompt is None else flight.prompt.tolist()
        guards = list(self._guards.values())
        states = [guard.start(prompt) for guard in guards]
        found = np.full(len(tokens), len(guards))
        for place, token in enumerate(tokens.tolist()):
            for i, guard in enumerate(guards):
                if guard.forbids(states[i], token):
                    found[place] = i
                    break
            states = [guard.after(one, token) for guard, one in zip(guards, states, strict=True)]
        return found


def _counted(layers: Ints) -> str:
    """Tokens by the layer that they left at."""
    left = layers.tolist()
    counts = [f'"{layer}": {left.count(layer)}' for layer in sorted(set(left))]
    return f"{{{', '.join(counts)}}}"


def _mean(confidence: NDArray[np.float32]) -> float | None:
    """Of those that are numbers, if any is."""
    sure = confidence.tolist()
    total = sum(sure)
    if not math.isfinite(total):
        sure = [one for one in sure if math.isfinite(one)]
        total = sum(sure)
    return total / len(sure) if sure else None
