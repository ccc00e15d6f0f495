"""One wrong token at position t, all others greedy from the last layer: how far the output goes astray (CALM, Fig. 2a).

``PYTHONPATH=benchmarks python benchmarks/studies/perturbation.py [--model g2p|numbers] [--checkpoint FOLDER]``

The wrong token is the last layer's 10th choice (sampling-based), or the first layer's best (layer-based), which is often no
other token at all. Similarity is one minus the edit distance to the undisturbed output over the longer one's length.
"""

import common
import figures
import numpy as np
import torch

from riskcal_adapters.torch.t5_backbone import T5Backbone
from riskcal_adapters.torch.training import teacher_forced

RANK = 10
POSITIONS = 9  # as many as a quarter of the outputs have
END = 1


def greedy(
    backbone: T5Backbone, ids: torch.Tensor, mask: torch.Tensor, forced: torch.Tensor, length: int
) -> torch.Tensor:
    """Tokens (B, T) of the last layer after those that are forced (B, t), 0 after the end."""
    cache = backbone.start(ids, mask.numpy().astype(bool), length)
    tokens = [torch.zeros(len(ids), dtype=torch.long)]
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for position in range(length):
        state = backbone.embed(tokens[-1].tolist(), cache)
        for index in range(backbone.n_layers):
            state = backbone.layer(index, state, cache)
        cache.append(state)
        chosen = (
            forced[:, position] if position < forced.shape[1] else backbone.logits(state).argmax(-1)
        )
        tokens.append(chosen.masked_fill(ended, 0))
        ended |= tokens[-1] == END
        if ended.all():
            break
    return torch.stack(tokens[1:], 1)


@torch.inference_mode()
def disturbed(decoder, task: common.Task) -> list[dict]:
    """A row for each position and kind of wrong token."""
    model = decoder.model
    backbone = T5Backbone(model, start=0)
    ids, mask = decoder.encode(task.prompts)
    tokens = greedy(backbone, ids, mask, ids[:, :0], task.max_new_tokens)
    full = decoder.decode(tokens)
    lengths = (tokens != 0).sum(1)
    start = torch.full((len(tokens), 1), model.config.decoder_start_token_id)
    logits = teacher_forced(model, ids, mask, torch.cat([start, tokens[:, :-1]], 1))
    wrong = {
        "sampling-based": logits[-1].topk(RANK).indices[..., -1],
        "layer-based": logits[0].argmax(-1),
    }
    long_enough = int(np.quantile(lengths.numpy(), 0.75))
    rows = []
    for position in np.unique(np.linspace(0, long_enough - 1, POSITIONS).round().astype(int)):
        some = torch.nonzero(lengths > position).flatten()
        for name, replaced in wrong.items():
            forced = torch.cat([tokens[:, :position], replaced[:, position : position + 1]], 1)[
                some
            ]
            texts = decoder.decode(
                greedy(backbone, ids[some], mask[some], forced, task.max_new_tokens)
            )
            whole = [full[i] for i in some.tolist()]
            away = np.array([task.distance(*pair) for pair in zip(texts, whole, strict=True)])
            edits = np.array(
                [task.edits(text, [one])[0] for text, one in zip(texts, whole, strict=True)]
            )
            changed = (replaced[some, position] != tokens[some, position]).numpy()
            rows.append(
                {
                    "kind": name,
                    "position": int(position),
                    "outputs": len(some),
                    "similarity": 1 - away.mean(),
                    "error": away.std() / len(away) ** 0.5,
                    "changed": changed.mean(),
                    "edits": edits[changed].mean() if changed.any() else 0.0,
                    "edits_se": edits[changed].std() / changed.sum() ** 0.5
                    if changed.any()
                    else 0.0,
                    "alone": 1 - (changed / (lengths[some].numpy() - 1).clip(1)).mean(),
                }
            )
    return rows


def main() -> None:
    options = common.parser(__doc__).parse_args()
    options.words = options.words or 200
    task, decoder = common.load(options)
    found = {"rows": disturbed(decoder, task), "rank": RANK}
    figures.save(common.save("perturbation", options, decoder, task, found))


if __name__ == "__main__":
    main()
