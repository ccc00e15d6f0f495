"""What callers give, as arrays of sizes that programs are compiled for."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from riskcal import RiskcalError


def given(values: Any, name: str) -> NDArray[Any]:
    """An array of what a caller gave for (B, S)."""
    try:
        return np.asarray(_detached(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise RiskcalError(
            f"{name}: not an array of numbers ({error}); give (B, S), padded to one length."
        ) from None


def _detached(values: Any) -> Any:
    """A PyTorch parameter's values; anything else as it is."""
    return values.detach().cpu() if hasattr(values, "detach") else values


def prompts_of(tokens: NDArray[Any], mask: NDArray[np.bool_]) -> list[list[int]]:
    """Each row's real tokens."""
    return [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]


def backend(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` behind a fast tokenizer of transformers; itself where it is one."""
    return getattr(tokenizer, "backend_tokenizer", tokenizer)


def round_tokens(count: int) -> int:
    """Tokens that there is room for."""
    return max(16, 1 << (count - 1).bit_length())


def round_rows(count: int, devices: int) -> int:
    """Rows that there is room for, as many on each device."""
    each = -(-count // devices)
    return devices * (1 << (each - 1).bit_length() if each <= 8 else -(-each // 8) * 8)
