"""Arrays whose rows are tokens carry a mark, since tokens of one prompt are not independent."""

from typing import Any

import numpy as np


class TokenLosses(np.ndarray):
    """An array whose rows are tokens, not independent prompts; `riskcal.calibrate` refuses it without ``prompts=``.

    What numpy makes of it is still one: slices, arithmetic, copies by its method, ``np.where`` and so on. A plain view of it
    (``np.asarray``) is known by the memory that it shares. A copy into a plain array or a list (``np.array``, ``tolist``, a
    DataFrame's values) is just numbers, of which nobody can tell where they came from.
    """

    __array_priority__ = 1.0  # concatenated with anything, they are still tokens

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        made = super().__array_function__(func, types, args, kwargs)
        return made.view(TokenLosses) if type(made) is np.ndarray else made


def holds_tokens(losses: Any) -> bool:
    """Whether an array is one of `TokenLosses`, or a view of one."""
    # a base of other objects means something else, and may have no end
    while isinstance(losses, np.ndarray):
        if isinstance(losses, TokenLosses):
            return True
        losses = losses.base
    return False
