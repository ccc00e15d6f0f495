"""`riskcal generate`, and `--model`: a checkpoint folder of one's own from the shell."""

import json

import pytest
import tiny_causal
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from riskcal import ExitPolicy, RiskcalError, Runs
from riskcal_adapters import cli
from riskcal_adapters.torch import ExitHead, load, load_example, save_heads

app = typer.Typer()
app.command("generate")(cli.generate)
app.command("record")(cli.record)
WORDS = ["banana", "calibrate", "risk", "layer", "exit"]


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def refusal(*arguments):
    result = run(*arguments)
    assert isinstance(result.exception, RiskcalError), result.output
    return str(result.exception)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of its own, as Hugging Face writes them."""
    path = tmp_path_factory.mktemp("llama")
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *WORDS, *"abcdefgh"])}
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), tiny_causal.VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(path)
    tiny_causal.llama().save_pretrained(path)
    return path


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def policy(tmp_path):
    ExitPolicy(threshold=0.6, max_new_tokens=12).save(tmp_path / "policy.json")
    return tmp_path / "policy.json"


@pytest.mark.parametrize("how", [["--batch-size", "2"], ["--engine", "--slots", "3"]], ids=str)
def test_what_is_written_is_what_the_decoder_generates(tmp_path, words, policy, how):
    out = tmp_path / "out.jsonl"
    result = run("generate", words, "--decoder", "g2p", "--policy", policy, "--out", out, *how)
    assert result.exit_code == 0, result.exception
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(range(5))
    decoder = load_example("g2p")
    for row, word in zip(rows, WORDS, strict=True):
        alone = decoder.generate(*decoder.encode([word]), policy=ExitPolicy.load(policy))
        assert row["tokens"] == alone.tokens[0].tolist()
        assert row["exit_layers"] == alone.exit_layers[0].tolist()
        assert row["text"] == decoder.decode(alone.tokens)[0]
    layers = [layer for row in rows for layer in row["exit_layers"]]
    assert f"5 prompts, {sum(layers) / len(layers):.2f} layers a token" in result.output


def test_texts_are_printed_and_the_full_model_is_the_default(words):
    result = run("generate", words, "--decoder", "g2p")
    assert result.stdout.splitlines()[0] == "B AH N AE N AH"
    assert len(result.stdout.splitlines()) == 5


def test_a_causal_checkpoint_of_ones_own_is_recorded_and_generated_with(tmp_path, folder, words):
    out = tmp_path / "runs"
    options = ["--model", folder, "--max-new-tokens", 4]
    recorded = run("record", words, "--out", out, "--thresholds", ".2,.6", *options)
    assert recorded.exit_code == 0, recorded.exception
    runs = Runs.read(out)
    assert (runs.n, runs.thresholds.tolist()) == (5, [0.6, 0.2])
    generated = run("generate", words, *options)
    decoder = load(folder)
    ids, mask = decoder.encode(WORDS)
    expected = decoder.decode(decoder.generate(ids, mask, max_new_tokens=4).tokens)
    assert generated.stdout.splitlines() == expected


def test_exit_heads_come_from_a_folder(tmp_path, folder, words):
    heads = tmp_path / "heads"
    save_heads({2: ExitHead.copied(load(folder).model)}, heads)
    ExitPolicy(threshold=-1.0).save(tmp_path / "policy.json")
    out = tmp_path / "out.jsonl"
    options = ["--model", folder, "--heads", heads, "--policy", tmp_path / "policy.json"]
    assert run("generate", words, *options, "--max-new-tokens", 3, "--out", out).exit_code == 0
    exits = [json.loads(line)["exit_layers"] for line in out.read_text().splitlines()]
    assert {layer for row in exits for layer in row} == {2}


def test_what_names_no_decoder_is_refused(tmp_path, folder, words):
    assert refusal("generate", words) == "--decoder: give one of --decoder NAME and --model FOLDER."
    assert "give one of" in refusal("generate", words, "--decoder", "g2p", "--model", folder)
    assert "holds no config.json" in refusal("generate", words, "--model", tmp_path)
    assert "--heads: belong to a --model" in refusal(
        "generate", words, "--decoder", "g2p", "--heads", tmp_path
    )
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "holds a model of type 'bert'; read are t5," in refusal(
        "generate", words, "--model", tmp_path
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "cannot be read" in refusal("generate", words, "--model", tmp_path)


def test_what_fails_leaves_no_file(tmp_path, folder):
    (tmp_path / "words.txt").write_text("banana\nbanana " + "risk " * 70 + "\n", encoding="utf-8")
    out = tmp_path / "out.jsonl"
    ExitPolicy(threshold=0.5, n_layers=3).save(tmp_path / "policy.json")
    options = ["--model", folder, "--out", out, "--policy", tmp_path / "policy.json"]
    for how in ([], ["--engine"]):
        assert "made for 3 layers" in refusal("generate", tmp_path / "words.txt", *options, *how)
    ExitPolicy(threshold=0.5, weights="0" * 32).save(tmp_path / "policy.json")
    for how in ([], ["--engine"]):
        assert "made for weights" in refusal("generate", tmp_path / "words.txt", *options, *how)
    assert not out.exists()
    assert torch.is_grad_enabled()


def test_a_policy_that_does_not_fit_the_engine_is_refused_with_the_way_out(folder, tmp_path):
    (tmp_path / "words.txt").write_text("banana\n")
    ExitPolicy(threshold=0.5, batching="deepest").save(tmp_path / "policy.json")
    given = (tmp_path / "words.txt", "--policy", tmp_path / "policy.json", "--model", folder)
    assert "batching: 'deepest' of the policy" in refusal("generate", *given, "--engine")
    assert "leave --engine out" in refusal("generate", *given, "--engine")
    assert run("generate", *given).exit_code == 0
