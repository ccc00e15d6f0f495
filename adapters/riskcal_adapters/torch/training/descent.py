"""Adam over a few named weights, whose state in a file is all that a training needs to go on to the same weights."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from riskcal import RiskcalError, internal
from riskcal_adapters.torch import replacing

_STATE = "state.safetensors"
#: Steps of rising learning rate, and what it falls to by the end.
_WARM_UP, _LEAST = 50, 0.02


class Descent:
    """Weights, and what Adam remembers of them.

    Parameters
    ----------
    weights : dict of str to Parameter
        What is trained, in place.
    steps : int
        In all. The rate rises over 50 of them, or a tenth if they are fewer, then falls as a cosine to 2%.
    rate : float
        The largest learning rate.
    """

    def __init__(self, weights: Mapping[str, torch.nn.Parameter], steps: int, rate: float) -> None:
        self.weights, self.steps, self.rate = dict(weights), steps, rate
        self.adam = torch.optim.Adam(self.weights.values(), lr=rate)

    def step(self, loss: Tensor, step: int) -> None:
        """Descend once; steps count from 0."""
        warm = min(_WARM_UP, max(self.steps // 10, 1))
        share = (1 + math.cos(math.pi * step / self.steps)) / 2
        rate = self.rate * min(1.0, (step + 1) / warm) * (_LEAST + (1 - _LEAST) * share)
        self.adam.param_groups[0]["lr"] = rate
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()

    def save(self, folder: Path, step: int) -> None:
        """Note the state after so many steps; the file is replaced whole."""
        tensors = {"step": torch.tensor(step)}
        for name, weight in self.weights.items():
            remembered = self.adam.state[weight]
            tensors[name] = weight.detach()
            tensors[f"{name}.mean"] = remembered["exp_avg"]
            tensors[f"{name}.square"] = remembered["exp_avg_sq"]
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with replacing.written(folder), internal.replacing(folder / _STATE) as partial:
            save_file(tensors, partial)

    def restored(self, folder: Path) -> int:
        """Steps that were made before, by what a folder holds; 0 where it holds nothing."""
        path = folder / _STATE
        if not path.exists():
            return 0
        try:
            found = load_file(path)
            step = found["step"]
            for name, weight in self.weights.items():
                weight.data.copy_(found[name])
                self.adam.state[weight] = {
                    "step": step.float(),
                    "exp_avg": found[f"{name}.mean"].to(weight.device),
                    "exp_avg_sq": found[f"{name}.square"].to(weight.device),
                }
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise RiskcalError(
                f"{path}: cannot be read ({error}); delete the folder {folder} and train again."
            ) from None
        return int(step)


def check_settings(steps: int, batch: int, save_steps: int, learning_rate: float) -> None:
    """Refuse what is no number of steps, or no learning rate."""
    for count, name in ((steps, "steps"), (batch, "batch"), (save_steps, "save_steps")):
        internal.count(count, name, least=1)
    rate = internal.number(learning_rate, "learning_rate")
    if not 0 < rate < math.inf:
        raise RiskcalError(f"learning_rate: {rate:g}; give a number above 0.")
