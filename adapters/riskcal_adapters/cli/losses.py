"""What ``--loss`` names: a measure of texts, or what makes an output valid."""

from collections.abc import Callable, Sequence

from riskcal import RiskcalError, internal
from riskcal_adapters import texts, validators
from riskcal_adapters.cli.decoders import NamedDecoder

Distance = Callable[[str, str], float]
Risk = Callable[[str, Sequence[str]], float]


def parse_loss(text: str) -> tuple[Distance, Risk]:
    """Distance and risk: of a measure's name, or of a validator as ``json-schema:FILE``, ``regex:PATTERN`` or ``valid:...``."""
    kind, _, rest = text.partition(":")
    if kind not in _VALIDATORS or not rest:
        distance, risk = texts.LOSSES[internal.choice(text, "--loss", texts.LOSSES)]
        try:
            distance("a", "b")  # a missing library must fail here, not in a worker
        except ImportError as missing:
            raise RiskcalError(f"--loss: {missing}") from None
        return distance, risk
    try:
        validator = _VALIDATORS[kind](rest)
    except (RiskcalError, ImportError) as error:
        raise RiskcalError(f"--loss: {error}") from None
    return validators.NewFailure(validator), validators.Failure(validator)


def _function(text: str) -> validators.Validator:
    module, _, function = text.partition(":")
    if not module or not function.isidentifier():
        raise RiskcalError(f"{text!r} is not MODULE:FUNCTION.")
    return NamedDecoder(module, function).resolve(option="")


_VALIDATORS: dict[str, Callable[[str], validators.Validator]] = {
    "json-schema": validators.JsonSchema.read,
    "regex": validators.Regex,
    "valid": _function,
}
