"""What an exit costs where the vocabulary is large: d_model 512, 8 layers, 32,128 tokens, batch 1.

The weights are random, so nothing is said about quality: **a cost measurement**. Every token exits at a depth drawn from the
exits that the certified policy takes on the spelling-to-phonemes model, whatever its confidence; the confidence is computed
all the same, at every layer up to the exit, as its measure needs it. Settings take turns; ratios are medians over rounds.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import command
import riskcal
from decode import timings
from recipes.g2p import data
from riskcal import ExitPolicy, Pruning, efficiency
from riskcal_adapters.torch import EarlyExitT5, load_example
from riskcal_adapters.torch.confidence import Judge
from riskcal_adapters.torch.measures import Confidences
from riskcal_adapters.torch.scores import Scores

FULL = "full model"
#: A threshold between the two confidences that `Forced` gives.
POLICIES = {
    FULL: ExitPolicy.full_model(),
    "softmax": ExitPolicy(threshold=0.0),
    "softmax, pruned head (decaying)": ExitPolicy(threshold=0.0, pruning=Pruning("decaying")),
    "softmax, pruned head (fixed)": ExitPolicy(threshold=0.0, pruning=Pruning("fixed")),
    "state": ExitPolicy(threshold=0.0, measure="state"),
    "classifier": ExitPolicy(threshold=0.0, measure="classifier"),
    "jsd contrast": ExitPolicy(threshold=0.0, measure="jsd"),
}


class Forced(Judge):
    """Computes the measure, and then says yes exactly from a given depth on."""

    depths: np.ndarray
    position: int

    def begin(self, targets: Tensor | None = None) -> None:
        """Start the next position."""
        super().begin(targets)
        self.position = getattr(self, "position", -2) + 1  # the constructor begins once more

    def look(
        self, layer: int, state: Tensor, before: Tensor | None
    ) -> tuple[Confidences, Scores | None]:
        """Compute, and answer as told."""
        confidence, scores = super().look(layer, state, before)
        depth = self.depths[self.position % len(self.depths)]
        return np.full_like(confidence, 1.0 if layer >= depth else -1.0), scores


class ForcedT5(EarlyExitT5):
    """Decodes with depths that are given."""

    depths: np.ndarray

    def _run(self, policy: ExitPolicy, *arguments: Any) -> Any:
        run = super()._run(policy, *arguments)
        run.judge = Forced(self._backbone, policy, self._classifier)
        run.judge.depths = self.depths
        return run


def recorded_depths(words: int = 200) -> np.ndarray:
    """The exit layers that the policy certified for a textual delta of .1 takes on held-out words, in order."""
    policy = riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1).policy()
    decoder = load_example("g2p")
    held_out = data.splits(data.read_dictionary(data.dictionary_path()))["development"].words[
        :words
    ]
    exits = decoder.generate(*decoder.encode(held_out), policy=policy).exit_layers
    return exits[exits > 0].numpy()


def random_model(seed: int) -> T5ForConditionalGeneration:
    """T5 v1.1 of T5-small's size, with a head of its own."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=32_128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_heads=6,
        num_layers=2,
        num_decoder_layers=8,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = torch.nn.Parameter(
        torch.randn(config.vocab_size, config.d_model) * config.d_model**-0.5
    )
    with torch.no_grad():
        model.lm_head.weight[config.eos_token_id] = (
            0  # so that every generation has the length asked for
        )
    return model


def decode(decoder: EarlyExitT5, policy: ExitPolicy, length: int, input_ids: Tensor) -> int:
    generation = decoder.generate(
        input_ids, torch.ones_like(input_ids), policy=policy, max_new_tokens=length
    )
    return int((generation.exit_layers > 0).sum())


def main() -> None:
    parser = command.parser(__doc__, figures=False)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--length", type=int, default=32, help="tokens generated for each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = random_model(options.seed)
    classifier = torch.nn.Linear(model.config.d_model, 1)
    decoder = ForcedT5(model, classifier=classifier)
    decoder.depths = recorded_depths()
    shares = efficiency.exit_shares(decoder.depths[None], decoder.n_layers)
    print(
        json.dumps(
            vars(options)
            | {"torch": torch.__version__, "share of exits by layer": shares.round(3).tolist()}
        )
    )
    prompts = [
        (torch.randint(2, 32_128, (1, options.prompt_length)),) for _ in range(options.prompts)
    ]
    ways: dict[str, Callable[..., int]] = {
        name: partial(decode, decoder, policy, options.length) for name, policy in POLICIES.items()
    }
    table = efficiency.speed_table(timings(ways, prompts, options.rounds), [FULL])
    shown = ["setting", "tokens_per_second", f"x {FULL}", f"x {FULL} low", f"x {FULL} high"]
    print("\nBatch 1, untrained weights, depths forced: cost only")
    print(table[shown].to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    main()
