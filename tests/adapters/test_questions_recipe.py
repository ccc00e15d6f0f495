"""The recipes' decoder behind a shared prefix: the tokens of Hugging Face's, and forks that leave no trace."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.questions.decoding import ANSWER, ASKED, Asker
from recipes.questions.log import answered


class Letters:
    """A tokenizer of one token a letter, for models of 128 tokens; a line ends at the special token alone or at a tilde."""

    all_special_ids = (0,)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 128 for letter in text]

    def get_vocab(self) -> dict[str, int]:
        return {("Ċ" if code == 126 else chr(code)): code for code in range(128)}


@pytest.fixture(scope="module")
def asker() -> Asker:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return Asker(LlamaForCausalLM(config).eval(), Letters(), "1 + 1 = 2; 2 + 3 = 5; ")  # type: ignore[arg-type]


QUESTIONS = ["4 + 4 =", "12 * 3 =", "7 =", "100 - 1 ="]


def expected(asker: Asker, text: list[int], most: int, ends: torch.Tensor) -> list[int]:
    ids = torch.tensor([Letters().encode("1 + 1 = 2; 2 + 3 = 5; ") + text])
    said = []
    for _ in range(most):
        with torch.inference_mode():
            said.append(int(asker.model(input_ids=ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[said[-1]]])], 1)
        if ends[said[-1]]:
            break
    return said


@pytest.mark.parametrize("every", [0, 1, 3])
def test_lines_and_forced_answers_are_those_of_the_model_alone(asker, every):
    lines = asker.lines(QUESTIONS, most=9, every=every)
    for question, line in zip(QUESTIONS, lines, strict=True):
        read = Letters().encode(question)
        assert line.tokens == expected(asker, read, 9, asker.ends)
        assert len(line.logprobs) == len(line.tokens)
        for at, answer in line.forced:
            asked = read + line.tokens[:at] + Letters().encode(ASKED)
            assert answer.tokens == expected(asker, asked, ANSWER, asker.stops)
        before = [at for at, _ in line.forced]
        assert (
            before
            == ([] if not every else list(range(0, len(line.tokens) + 1, every)))[: len(before)]
        )
        assert every == 0 or len(before) >= len(line.tokens) // every


def test_a_log_that_was_cut_off_goes_on_and_asks_nothing_twice(tmp_path):
    asked = []

    def ask(some):
        asked.extend(some)
        return [{"answer": item * 2} for item in some]

    path = tmp_path / "out" / "log.jsonl"
    items = [3, 1, 3, 4]
    assert [row["answer"] for row in answered(path, items, ask, 2)] == [6, 2, 6, 8]
    assert asked == [3, 1, 4]
    path.write_text(path.read_text()[:-4])  # the last line is torn
    assert [row["answer"] for row in answered(path, [*items, 5], ask, 2)] == [6, 2, 6, 8, 10]
    assert asked == [3, 1, 4, 4, 5]
