"""What an event tells of a request beside its answer: what may drift, and its tokens by class."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from riskcal import RiskcalError
from riskcal.forbidden import Guard, Rule
from riskcal.internal import shown
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
        self._weights = decoder.weights
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
            self._guards[name] = Guard((rule,), decoder._loop.text)

    def served(self, flight: Flight, done: Done) -> dict[str, Any]:
        """Of a request that has an output."""
        told: dict[str, Any] = {
            "gen_ai.usage.output_tokens": len(done.tokens),
            "gen_ai.request.temperature": flight.temperature,
            "riskcal.weights": self._weights,
            "riskcal.exit.layers": _counted(done.exit_layers),
        }
        if flight.prompt is not None:
            told["gen_ai.usage.input_tokens"] = len(flight.prompt)
        # as Python's numbers, and layers too: this is done for every request, and outputs are short
        sure = [one for one in done.confidence.tolist() if math.isfinite(one)]
        if sure:
            told["riskcal.confidence"] = sum(sure) / len(sure)
        if self._guards:
            of = self._classes(flight, done.tokens)
            told["riskcal.exit.classes"] = {
                name: _counted(done.exit_layers[of == i]) for i, name in enumerate(self._names)
            }
        return told

    def compared(self, flight: Flight, served: Done, full: Done) -> dict[str, Any]:
        """Of a shadow: by class, how many served tokens are not the full model's at their place, and how many there are."""
        if not self._guards:
            return {}
        of = self._classes(flight, served.tokens)
        apart = np.ones(len(served.tokens), dtype=bool)
        both = min(len(served.tokens), len(full.tokens))
        apart[:both] = served.tokens[:both] != full.tokens[:both]
        pairs = {
            name: [int(apart[of == i].sum()), int((of == i).sum())]
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


def _counted(layers: Ints) -> dict[str, int]:
    """Tokens by the layer that they left at."""
    found: dict[int, int] = {}
    for layer in layers.tolist():
        found[layer] = found.get(layer, 0) + 1
    return {str(layer): found[layer] for layer in sorted(found)}
