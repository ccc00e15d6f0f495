"""`Saved`: what is a file of its own, one JSON object."""

import os
from typing import ClassVar, Self

from riskcal import _replacing, _validate
from riskcal._validate import RiskcalError
from riskcal.policy.fields import Frozen


class Saved(Frozen):
    """A frozen object with a file of its own."""

    #: What messages call it.
    called: ClassVar[str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; an existing file is replaced whole or not at all."""
        with _replacing.replacing(path) as partial:
            partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; unknown fields and other schema versions are refused, never ignored."""
        file = _replacing.a_path(path)
        try:  # an editor may have begun it with a byte-order mark
            text = file.read_text(encoding="utf-8-sig")
            fields = _validate.from_json(text, each_name_once=True)
        except OSError as error:
            raise RiskcalError(f"{path}: cannot be read ({error.strerror}).") from None
        except ValueError as error:
            raise RiskcalError(f"{path}: is not JSON ({error}).") from None
        if not isinstance(fields, dict):
            raise RiskcalError(f"{path}: is not a {cls.called}; it must hold one JSON object.")
        try:
            return cls(**_validate.of_one_meaning(fields))
        except ValueError as error:
            raise RiskcalError(f"{path}: {error}") from None
