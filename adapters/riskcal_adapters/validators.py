"""What a product needs of an output, as losses: whether it parses, fits a schema or an expression, or passes a check of your own.

A *validator* is a function of an output that says whether it is valid: True or False, or how far it is, from 0 to 1.
``Failure(validator)`` makes it a risk and ``NewFailure(validator)`` a dissimilarity, as `riskcal_adapters.record` and the
engine's ``loss=`` take them.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from riskcal import RiskcalError

Validator = Callable[[str], float]


@dataclass(frozen=True)
class Failure:
    """Risk of an output: 1 where it is not valid, 0 where it is. References are not looked at, and need not be there.

    Parameters
    ----------
    validator : callable
        ``validator(output)``, True or False, or in [0, 1], 1 being valid. For a pool of processes it must be picklable.

    Raises
    ------
    RiskcalError
        When called, if the validator returns anything else.

    Examples
    --------
    >>> from riskcal_adapters.validators import Failure, Regex
    >>> risk = Failure(Regex("[0-9]{4}"))
    >>> risk("2024"), risk("last year")
    (0.0, 1.0)
    """

    validator: Validator
    needs_references: ClassVar[bool] = False

    def __call__(self, output: str, references: str | Sequence[str] = ()) -> float:
        return 1.0 - _checked(self.validator, output)


@dataclass(frozen=True)
class NewFailure:
    """Dissimilarity of two outputs: 1 where the early one is not valid and the full model's is, else 0.

    What the full model fails at is not laid to early exits; `Failure` counts it.

    Parameters
    ----------
    validator : callable
        As for `Failure`; of grades in [0, 1], what the early output lacks of the full model's counts.

    Examples
    --------
    >>> from riskcal_adapters.validators import NewFailure, Regex
    >>> dissimilarity = NewFailure(Regex("[0-9]{4}"))
    >>> dissimilarity("last year", "2024"), dissimilarity("last year", "in 2024")  # the full model fails as well
    (1.0, 0.0)
    """

    validator: Validator

    def __call__(self, early: str, full: str) -> float:
        if early == full:
            return 0.0
        return max(0.0, _checked(self.validator, full) - _checked(self.validator, early))


@dataclass(frozen=True)
class JsonSchema:
    """Whether an output is one JSON document of a schema (``jsonschema``, extra ``validators``).

    Parameters
    ----------
    schema : dict, bool or str
        The schema, or its text. Of the draft that its ``$schema`` names, else the latest. References outside it are not
        followed, and ``format`` is not asserted, as the drafts have it.

    Raises
    ------
    RiskcalError
        For what is no schema; when called, for a reference that leads out of it.
    ImportError
        If jsonschema is not installed.

    Examples
    --------
    >>> from riskcal_adapters.validators import JsonSchema
    >>> valid = JsonSchema({"type": "object", "required": ["name"]})
    >>> valid('{"name": "Ada"}'), valid('{"name": "Ada"'), valid("{}")
    (True, False, False)
    """

    schema: str

    def __init__(self, schema: dict[str, Any] | bool | str) -> None:
        try:
            held = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(held, sort_keys=True)
        except (ValueError, TypeError, RecursionError) as error:
            raise RiskcalError(f"schema: is not JSON ({error}).") from None
        object.__setattr__(self, "schema", text)
        _compiled(text)

    @classmethod
    def read(cls, path: str | Path) -> "JsonSchema":
        """The schema in a file."""
        try:
            return cls(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RiskcalError(f"{path}: cannot be read ({error.strerror}).") from None
        except (RiskcalError, UnicodeDecodeError) as error:
            raise RiskcalError(f"{path}: {error}") from None

    def __call__(self, output: str) -> bool:
        try:
            document = json.loads(output, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return False
        try:
            return bool(_compiled(self.schema).is_valid(document))
        except RecursionError:
            return False
        except Exception as error:
            if not isinstance(error, _library("referencing.exceptions").Unresolvable):
                raise
            raise RiskcalError(
                f"schema: its reference {error.ref!r} is not found in it; put what it refers to under $defs."
            ) from None


@dataclass(frozen=True)
class Regex:
    r"""Whether an output as a whole matches a regular expression.

    Parameters
    ----------
    pattern : str
        As `re.fullmatch` takes it; ``(?s).*\d.*`` for one that only has to be somewhere.

    Examples
    --------
    >>> from riskcal_adapters.validators import Regex
    >>> Regex(r"\d{4}-\d\d-\d\d")("2024-05-01")
    True
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise RiskcalError(f"pattern: is no regular expression ({error}).") from None

    def __call__(self, output: str) -> bool:
        return re.fullmatch(self.pattern, output) is not None


def _checked(validator: Validator, output: str) -> float:
    value = validator(output)
    try:
        grade = float(value)
    except (TypeError, ValueError):
        grade = -1.0
    if not 0.0 <= grade <= 1.0:
        raise RiskcalError(
            f"validator: {value!r} for {output!r} is neither True nor False nor a number from 0 to 1; 1 is valid."
        )
    return grade


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@lru_cache(maxsize=16)
def _compiled(schema: str) -> Any:
    """By its text: each shard of a recording unpickles a validator of its own."""
    held, jsonschema = json.loads(schema), _library("jsonschema")
    kind = jsonschema.validators.validator_for(held, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(held)
    except jsonschema.SchemaError as error:
        raise RiskcalError(f"schema: {error.json_path}: {error.message}.") from None
    # with a registry given, here of the drafts' own schemas, it never asks the network
    return kind(held, registry=_library("jsonschema_specifications").REGISTRY)


def _library(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise ImportError(
            "schemas need jsonschema: pip install 'riskcal-ltt[validators]'"
        ) from None
