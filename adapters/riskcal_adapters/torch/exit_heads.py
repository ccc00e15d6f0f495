"""Heads of their own for layers of a causal language model: a norm like the final one, then a linear map to tokens.

A copy of the final head costs what the final head costs, at a real vocabulary more than several layers. A low-rank head
covers all tokens for a fraction of it; a small one covers the tokens that it was made for, and names them by ``ids``.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from riskcal import RiskcalError, internal
from riskcal_adapters import fingerprint

#: The tensors of a head.
PARTS = ("norm_weight", "norm_bias", "down", "weight", "ids")
_MATRICES = ("down", "weight")


@dataclass(frozen=True, eq=False)
class ExitHead:
    """Logits from the raw state after a layer.

    Attributes
    ----------
    norm_weight : (d,)
    norm_bias : (d,) or None
        None: the norm is an RMSNorm, which centres nothing; else a LayerNorm.
    epsilon : float
        Of the norm.
    weight : (V, d), or (V, r) with ``down``
        V is the number of tokens that the head covers.
    down : (r, d) or None
        The first of two factors.
    ids : (V,) int64 or None
        The tokens' ids, each once; None: all of the vocabulary, in order.
    backbone : str or None
        Fingerprint of the model that the head was made for (`exit_head_checks.backbone_fingerprint`); None: any of its width.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import ExitHead
    >>> head = ExitHead(norm_weight=torch.ones(16), norm_bias=None, epsilon=1e-6, weight=torch.randn(60, 16))
    >>> head.logits(torch.randn(2, 16)).shape, head.parameters
    (torch.Size([2, 60]), 976)

    `ExitHead.copied`, `small`, `low_rank` and `fresh` make heads for a model; `training.train_heads` trains them.

    """

    norm_weight: Tensor
    norm_bias: Tensor | None
    epsilon: float
    weight: Tensor
    down: Tensor | None = None
    ids: Tensor | None = None
    backbone: str | None = None

    def __post_init__(self) -> None:
        width = self.norm_weight.numel()
        _expect("norm_weight", self.norm_weight, (width,))
        if self.norm_bias is not None:
            _expect("norm_bias", self.norm_bias, (width,))
        if self.down is not None:
            _expect("down", self.down, (self.down.shape[0], width))
        inner = width if self.down is None else self.down.shape[0]
        _expect("weight", self.weight, (self.weight.shape[0], inner))
        if not self.epsilon > 0:
            raise RiskcalError(f"epsilon: {self.epsilon:g}; a norm's is above 0.")
        if self.ids is not None:
            _check_ids(self.ids, len(self.weight))

    @property
    def width(self) -> int:
        """Width d of the states that it reads."""
        return self.norm_weight.numel()

    @property
    def parameters(self) -> int:
        """Numbers that the head has, ids not counted."""
        return sum(part.numel() for name, part in self.held() if name != "ids")

    @property
    def bytes(self) -> int:
        """What they take in memory, ids included."""
        return sum(part.numel() * part.element_size() for _, part in self.held())

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of its weights and of what else changes its logits, as policies name it."""
        named: list[tuple[str, Any]] = [
            (name, part.detach().float().cpu().numpy()) for name, part in self.held()
        ]
        return fingerprint.of_weights([*named, ("epsilon", np.array([self.epsilon]))])

    def logits(self, state: Tensor) -> Tensor:
        """(B, V) from raw states (B, d), in the type of the head's weights."""
        normed = self.normed(state)
        if self.down is not None:
            normed = F.linear(normed, self.down)
        return F.linear(normed, self.weight)

    def normed(self, state: Tensor) -> Tensor:
        """(B, d) after the head's norm, which is computed in float32."""
        wide = state.float()
        if self.norm_bias is None:
            scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
            return (scaled * self.norm_weight.float()).to(self.weight.dtype)
        gain, bias = self.norm_weight.float(), self.norm_bias.float()
        normed = F.layer_norm(wide, (self.width,), gain, bias, self.epsilon)
        return normed.to(self.weight.dtype)

    def said(self, state: Tensor) -> Tensor:
        """(B,) the ids of the likeliest tokens it covers."""
        best = self.logits(state).argmax(-1)
        return best if self.ids is None else self.ids[best]

    def to(self, target: torch.device | torch.dtype | str) -> "ExitHead":
        """The same on another device, or in another floating type."""
        moved: dict[str, Any] = {
            name: part.to(target) for name, part in self.held() if name != "ids"
        }
        if self.ids is not None:
            moved["ids"] = self.ids if isinstance(target, torch.dtype) else self.ids.to(target)
        return dataclasses.replace(self, **moved)

    def across(self) -> "ExitHead":
        """The same with each column of its matrices in one piece of memory: logits of one state take half the time."""
        turned: dict[str, Any] = {
            name: part.t().contiguous().t() for name, part in self.held() if name in _MATRICES
        }
        return dataclasses.replace(self, **turned)

    def held(self) -> list[tuple[str, Tensor]]:
        """The tensors that it has, by name."""
        return [(name, part) for name in PARTS if (part := getattr(self, name)) is not None]

    @classmethod
    def copied(cls, model: Any) -> "ExitHead":
        """The model's own final norm and head."""
        norm, weight = final_head(model)
        return cls(**norm, weight=weight.clone())

    @classmethod
    def fresh(cls, model: Any, *, seed: int = 0, ids: Sequence[int] | None = None) -> "ExitHead":
        """A norm of gain 1, and weights drawn with standard deviation ``d ** -0.5``; over some tokens, if ``ids`` names them."""
        norm, weight = final_head(model)
        kept = _kept(ids, len(weight))
        rows = len(weight) if kept is None else len(kept)
        drawn = np.random.default_rng(seed).standard_normal((rows, weight.shape[1]), np.float32)
        ones = torch.ones_like(norm["norm_weight"])
        bias = None if norm["norm_bias"] is None else torch.zeros_like(ones)
        return cls(
            **norm | {"norm_weight": ones, "norm_bias": bias},
            weight=(torch.from_numpy(drawn) * weight.shape[1] ** -0.5).to(weight),
            ids=None if kept is None else kept.to(weight.device),
        )

    @classmethod
    def low_rank(cls, model: Any, rank: int, *, ids: Sequence[int] | None = None) -> "ExitHead":
        """The matrix of this rank that is nearest to the final head, or to its rows ``ids``, in two factors."""
        norm, weight = final_head(model)
        kept = _kept(ids, len(weight))
        rows = (weight if kept is None else weight[kept.to(weight.device)]).float()
        internal.count(rank, "rank", least=1)
        if rank > min(rows.shape):
            raise RiskcalError(
                f"rank: {rank}, and the head is {tuple(rows.shape)}; give at most {min(rows.shape)}."
            )
        # from the small Gram matrix, in float64: its singular vectors on the right are the head's
        wide = rows.double()
        down = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(-1)[:, :rank].T
        return cls(
            **norm,
            weight=(wide @ down.T).to(weight),
            down=down.contiguous().to(weight),
            ids=None if kept is None else kept.to(weight.device),
        )

    @classmethod
    def small(cls, model: Any, ids: Sequence[int]) -> "ExitHead":
        """The final norm, and the final head's rows of these tokens: same logits as the full head's at the last layer."""
        norm, weight = final_head(model)
        kept = _kept(ids, len(weight))
        assert kept is not None
        kept = kept.to(weight.device)
        return cls(**norm, weight=weight[kept].clone(), ids=kept)


def final_head(model: Any) -> tuple[dict[str, Any], Tensor]:
    """A causal language model's final norm, as fields of an `ExitHead`, and its head (V, d).

    Raises
    ------
    RiskcalError
        If the norm is neither an RMSNorm nor a LayerNorm, or the head is more than a matrix.
    """
    base, head = model.base_model, model.get_output_embeddings()
    norm = getattr(base, "norm", None) or getattr(base, "ln_f", None)
    gain = getattr(norm, "weight", None)
    headless = head is None or getattr(head, "bias", None) is not None
    if headless or norm is None or not isinstance(gain, Tensor):
        raise RiskcalError(
            f"model: {type(model).__name__} does not end in one norm and a matrix without bias, which an exit head is; give a "
            "model of the Llama or GPT-2 family."
        )
    bias = getattr(norm, "bias", None)
    epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))
    found: dict[str, Any] = {
        "norm_weight": gain.detach().clone(),
        "norm_bias": None if bias is None else bias.detach().clone(),
        "epsilon": epsilon,
    }
    weight: Tensor = head.weight.detach()
    probe = torch.linspace(-2.0, 3.0, 2 * gain.numel(), device=gain.device).view(2, -1).to(gain)
    own = ExitHead(**found, weight=weight[:1]).normed(probe)
    with torch.no_grad():
        theirs = norm(probe)
    if not torch.allclose(own.float(), theirs.float(), rtol=1e-2, atol=1e-4):
        raise RiskcalError(
            f"model: its final norm, {type(norm).__name__}, is neither an RMSNorm nor a LayerNorm; give a model of the Llama "
            "or GPT-2 family."
        )
    return found, weight


def _expect(name: str, part: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(part.shape) != shape or not part.numel() or not part.is_floating_point():
        raise RiskcalError(
            f"{name}: is {tuple(part.shape)} of {part.dtype}; give {shape} of a floating type."
        )


def _check_ids(ids: Tensor, rows: int) -> None:
    if ids.dtype != torch.int64 or tuple(ids.shape) != (rows,):
        raise RiskcalError(
            f"ids: {tuple(ids.shape)} of {ids.dtype}; give the int64 ids of the head's {rows} tokens."
        )
    if ids.min() < 0 or len(set(ids.tolist())) != rows:
        raise RiskcalError("ids: one is negative or stands twice; name each token once.")


def _kept(ids: Sequence[int] | None, vocabulary: int) -> Tensor | None:
    if ids is None:
        return None
    kept = torch.as_tensor(ids, dtype=torch.int64)
    if kept.ndim != 1 or not len(kept):
        raise RiskcalError("ids: there is none; name at least one token.")
    foreign = (kept < 0) | (kept >= vocabulary)
    if foreign.any():
        raise RiskcalError(
            f"ids: {int(kept[foreign][0])} at index {internal.first(foreign.numpy())} is not in the vocabulary of {vocabulary}."
        )
    _check_ids(kept, len(kept))
    return kept
