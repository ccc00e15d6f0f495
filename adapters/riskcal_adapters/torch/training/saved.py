"""The weights that a run of training wrote, read back, and the checkpoint that is made of a trained model."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration

from riskcal import RiskcalError
from riskcal_adapters import fingerprint
from riskcal_adapters.torch import replacing
from riskcal_adapters.torch.training import folders


def weights_of(model: T5ForConditionalGeneration) -> str:
    """Fingerprint of a model's weights."""
    return fingerprint.of_weights(
        (name, weight.detach().float().cpu()) for name, weight in model.state_dict().items()
    )


def weights_of_file(path: Path, model: T5ForConditionalGeneration) -> str:
    """Fingerprint that the model would have with the weights of a file, which leaves out copies of the embedding."""
    found = dict(model.state_dict()) | _read_weights(path)
    return fingerprint.of_weights((name, weight.float().cpu()) for name, weight in found.items())


def steps_of(checkpoint: Path) -> int:
    """How many steps a checkpoint of Hugging Face's trainer is the work of."""
    return int(folders.read_settings(checkpoint / "trainer_state.json")["global_step"])


def load_weights(model: T5ForConditionalGeneration, path: Path) -> None:
    """Give the model the weights of a file."""
    found = _read_weights(path)
    copies = {
        name
        for name, weight in model.state_dict(keep_vars=True).items()
        if weight is model.shared.weight
    }
    lacking = sorted(set(model.state_dict()) - copies - set(found))
    if lacking:
        raise RiskcalError(
            f"{path}: lacks {lacking[0]}; delete the folder {path.parent} and train again."
        )
    model.load_state_dict(found, strict=False)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RiskcalError(
            f"{path}: cannot be read ({error}); delete the folder {path.parent} and train again."
        ) from None


def write_checkpoint(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Half-precision weights, each stored once, with the configs and tokenizer that read them back.

    Examples
    --------
    >>> from pathlib import Path
    >>> from riskcal_adapters.torch import load, load_example
    >>> from riskcal_adapters.torch.training.trainer import write_checkpoint
    >>> decoder = load_example("g2p")
    >>> write_checkpoint(decoder.model, decoder.tokenizer, Path("checkpoint"))
    >>> load("checkpoint").weights == decoder.weights
    True
    """
    with replacing.replaced(folder) as staging:
        tokenizer.save_pretrained(staging)
        # the trainer turns it off, and generate() with a given cache then goes wrong
        model.config.use_cache = True
        model.config.save_pretrained(staging)
        model.generation_config.save_pretrained(staging)
        again = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}  # what is shared
        weights = {
            name: weight.detach().half().contiguous()
            for name, weight in model.state_dict().items()
            if name not in again
        }
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
