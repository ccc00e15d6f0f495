"""Which decoder a command runs: one that ships, a checkpoint of one's own, or whatever a function returns."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from riskcal import RiskcalError
from riskcal_adapters.recording.protocol import Decoder

DecoderOption = Annotated[
    str | None,
    typer.Option(
        help="MODULE:FUNCTION that returns a decoder, or the name of a shipped one: g2p or numbers, jax:g2p for JAX.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    Path | None,
    typer.Option(
        help="Instead of --decoder: the folder of a Hugging Face checkpoint, T5 or causal, with its tokenizer.",
        show_default=False,
    ),
]
HeadsOption = Annotated[
    Path | None,
    typer.Option(help="With --model: the folder of its exit heads.", show_default="none"),
]


@dataclass(frozen=True)
class NamedDecoder:
    """A decoder by the name of the function that returns it: picklable, and imported only where it is called."""

    module: str
    function: str
    arguments: tuple[str, ...] = ()

    def __call__(self) -> Decoder:
        decoder: Decoder = self.resolve()(*self.arguments)
        return decoder

    def resolve(self, option: str = "--decoder: ") -> Callable[..., Any]:
        """Import the function; a refusal begins with the option that named it."""
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)  # the user's own modules, as with `python -m`
        try:
            found: Callable[..., Any] | None = getattr(
                importlib.import_module(self.module), self.function, None
            )
        except ImportError as error:
            raise RiskcalError(
                f"{option}module {self.module} cannot be imported ({error})."
            ) from None
        if not callable(found):
            raise RiskcalError(f"{option}module {self.module} has no function {self.function!r}.")
        return found


def parse_decoder(text: str) -> NamedDecoder:
    """``MODULE:FUNCTION``, or the short name of a checkpoint that ships: ``g2p`` is ``torch:g2p``, ``jax:g2p`` the other."""
    module, colon, function = text.partition(":")
    if not colon:
        module, function = "torch", text
    if module in ("torch", "jax"):
        return NamedDecoder(f"riskcal_adapters.{module}", "load_example", (function,))
    if not module or not function.isidentifier():
        raise RiskcalError(
            f"--decoder: {text!r} is neither MODULE:FUNCTION nor the name of a shipped decoder (g2p, jax:g2p)."
        )
    return NamedDecoder(module, function)


def asked_decoder(decoder: str | None, model: Path | None, heads: Path | None) -> NamedDecoder:
    """The decoder that options name."""
    if (decoder is None) == (model is None):
        raise RiskcalError("--decoder: give one of --decoder NAME and --model FOLDER.")
    if decoder is not None:
        if heads is not None:
            raise RiskcalError("--heads: belong to a --model; a decoder brings its own.")
        return parse_decoder(decoder)
    if model is None or not (model / "config.json").is_file():
        raise RiskcalError(
            f"--model: {model} holds no config.json; give the folder that model.save_pretrained wrote."
        )
    arguments = (str(model),) if heads is None else (str(model), str(heads))
    return NamedDecoder("riskcal_adapters.torch", "load", arguments)
