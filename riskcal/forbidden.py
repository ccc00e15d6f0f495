"""Classes of tokens at which no early exit is allowed, judged on the context so far and the candidate token.

A class is a small frozen value. A request walks through it: ``state = rule.start()``, ``rule.forbids(state, id, text)`` for a
candidate, ``state = rule.after(state, text)`` for the token that was emitted. The work per token is that of its own text.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from riskcal import _validate
from riskcal._validate import RiskcalError

#: Where the generated text stands: whether inside, and what of the last characters matters.
State = tuple[bool, int]

#: Tokens after texts that a guard remembers; then it begins anew.
_SAID_AT_MOST = 100_000

#: How a tokenizer shows the bytes of a character that a token holds in part.
PIECE = "\ufffd"


def _json_string(state: State, character: str) -> State:
    inside, escaping = state
    if inside and escaping:
        return (True, 0)
    if character == '"':
        return (not inside, 0)
    return (inside, int(inside and character == "\\"))


def _code_block(state: State, character: str) -> State:
    inside, ticks = state
    if character != "`":
        return (inside, 0)
    return (not inside, 0) if ticks == 2 else (inside, ticks + 1)


def _number(_: State, character: str) -> State:
    return (character.isdigit() or character == PIECE, 0)


def _identifier(state: State, character: str) -> State:
    """Memory is 1 in a word that began with a digit: ``2x`` is no name, and neither is its ``x``."""
    if character == PIECE:  # perhaps a letter
        return (True, 0)
    goes_on = f"a{character}".isidentifier()
    begins = character.isidentifier()
    inside = state[0] if state[0] or state[1] else begins
    return (goes_on and inside, int(goes_on and not inside))


def _code_identifier(state: State, character: str) -> State:
    """Memory is that of a block, of being in one, and of an identifier, in this order."""
    inside, held = state
    ticks, block, digits = held % 3, bool(held // 3 % 2), held // 6
    block, ticks = _code_block((block, ticks), character)
    inside, digits = _identifier((inside, digits), character) if block else (False, 0)
    return (inside, ticks + 3 * block + 6 * digits)


_STEPS: dict[str, Callable[[State, str], State]] = {
    "json_string": _json_string,
    "code_block": _code_block,
    "number": _number,
    "identifier": _identifier,
    "code_identifier": _code_identifier,
}


class _Rule:
    """A class of tokens, the same after any text unless it says otherwise: nothing is remembered of it."""

    def start(self) -> State:
        """The state before the first generated token."""
        return (False, 0)

    def after(self, state: State, text: str) -> State:
        """The state after a token was emitted."""
        return state


@dataclass(frozen=True)
class Inside(_Rule):
    r"""Tokens of which a character stands inside a context.

    Parameters
    ----------
    context : {"json_string", "identifier", "code_identifier", "code_block", "number"}
        ``"json_string"``: between double quotes, a backslash escaping what follows; all text is taken for JSON.
        ``"identifier"``: a word as `str.isidentifier` has it, letters, digits and ``_`` that do not begin with a digit; all text
        is taken for code, its keywords, comments and strings too, since a word is known to be a keyword only once it has ended.
        The token that follows one, and so ends it, is held too.
        ``"code_identifier"``: the same between fences of three backticks, where other text is prose.
        ``"code_block"``: between such fences. ``"number"``: a digit, or what directly follows one.
    prompt : bool
        Whether the context begins with the prompt, for prompts that the output continues (``{"name": "``). By default it
        begins with the output: a quotation mark in a question opens no string of the answer.

    Notes
    -----
    A token may hold a character in part, some bytes of it, which a tokenizer shows as U+FFFD. It may be a part of a letter or a
    digit, so it counts as one: more is forbidden then than stands in the context, never less.

    Examples
    --------
    >>> rule = riskcal.serving.Inside("json_string")
    >>> state = rule.after(rule.start(), '{"na')
    >>> rule.forbids(state, 7, 'me"'), rule.forbids(rule.start(), 8, "{")
    (True, False)
    >>> rule = riskcal.serving.Inside("identifier")
    >>> state = rule.after(rule.start(), "1 + to")
    >>> rule.forbids(state, 7, "tal"), rule.forbids(rule.start(), 8, "1 + 2")
    (True, False)
    """

    context: Literal["json_string", "code_block", "number", "identifier", "code_identifier"]
    prompt: bool = False
    kind: Literal["inside"] = "inside"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _validate.choice(self.context, "context", tuple(_STEPS))

    def after(self, state: State, text: str) -> State:
        """The state after a token was emitted."""
        step = _STEPS[self.context]
        for character in text:
            state = step(state, character)
        return state

    def forbids(self, state: State, token: int, text: str) -> bool:
        """Whether the candidate may not exit early."""
        if state[0]:
            return True
        step = _STEPS[self.context]
        for character in text:
            state = step(state, character)
            if state[0]:
                return True
        return False


@dataclass(frozen=True)
class Tokens(_Rule):
    """Tokens of a set.

    Parameters
    ----------
    ids : iterable of int
        Kept sorted and once each, so that equal sets are equal rules.

    Examples
    --------
    >>> rule = riskcal.serving.Tokens(ids=(50, 7, 50))
    >>> rule.ids, rule.forbids(rule.start(), 7, "not"), rule.forbids(rule.start(), 8, "so")
    ((7, 50), True, False)
    >>> policy = riskcal.ExitPolicy(threshold=0.8, forbidden=[rule])
    """

    ids: tuple[int, ...]
    kind: Literal["tokens"] = "tokens"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not isinstance(self.ids, Iterable):
            raise RiskcalError(
                f"ids: {_validate.shown(self.ids)} is no list of tokens; give ({self.ids!r},)."
            )
        object.__setattr__(self, "ids", tuple(self.ids))
        for index, token in enumerate(self.ids):
            if not _validate.is_whole(token) or token < 0:
                raise RiskcalError(
                    f"ids: {_validate.shown(token)} at index {index} is no token; give whole numbers from 0."
                )
        if not self.ids:
            raise RiskcalError("ids: none given; leave the rule out.")
        object.__setattr__(self, "ids", tuple(sorted({int(token) for token in self.ids})))

    def forbids(self, state: State, token: int, text: str) -> bool:
        """Whether the candidate may not exit early."""
        index = bisect_left(self.ids, token)
        return index < len(self.ids) and self.ids[index] == token


@dataclass(frozen=True)
class Pattern(_Rule):
    r"""Tokens whose own text a regular expression finds, the context left aside.

    Parameters
    ----------
    pattern : str
        As `re.search` takes it.

    Examples
    --------
    >>> rule = riskcal.serving.Pattern(r"\d")
    >>> rule.forbids(rule.start(), 7, " 42"), rule.forbids(rule.start(), 8, " cats")
    (True, False)
    """

    pattern: str
    kind: Literal["pattern"] = "pattern"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise RiskcalError(f"pattern: is no regular expression ({error}).") from None

    def forbids(self, state: State, token: int, text: str) -> bool:
        """Whether the candidate may not exit early."""
        return re.search(self.pattern, text) is not None


#: Any class of tokens.
Rule = Inside | Tokens | Pattern


@dataclass(frozen=True)
class Guard:
    """The classes of one policy, with the texts of tokens; the states of a request, one for each class, go through it."""

    rules: tuple[Rule, ...]
    text: Callable[[int], str]
    #: What rules said of a token after a text, which they are asked time and again: there are few states.
    _said: dict[tuple[tuple[State, ...], int], tuple[bool, tuple[State, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def start(self, prompt: Iterable[int]) -> tuple[State, ...]:
        """The states before the first generated token, after this prompt."""
        read = [isinstance(rule, Inside) and rule.prompt for rule in self.rules]
        text = "".join(map(self.text, prompt)) if any(read) else ""
        return tuple(
            rule.after(rule.start(), text if reads else "")
            for rule, reads in zip(self.rules, read, strict=True)
        )

    def after(self, states: tuple[State, ...], token: int) -> tuple[State, ...]:
        """The states after a token was emitted."""
        return self._of(states, token)[1]

    def forbids(self, states: tuple[State, ...], token: int) -> bool:
        """Whether any class has the candidate."""
        return self._of(states, token)[0]

    def _of(self, states: tuple[State, ...], token: int) -> tuple[bool, tuple[State, ...]]:
        said = self._said.get((states, token))
        if said is not None:
            return said
        text = self.text(token)
        pairs = list(zip(self.rules, states, strict=True))
        said = (
            any(rule.forbids(state, token, text) for rule, state in pairs),
            tuple(rule.after(state, text) for rule, state in pairs),
        )
        if len(self._said) >= _SAID_AT_MOST:
            self._said.clear()
        self._said[states, token] = said
        return said
