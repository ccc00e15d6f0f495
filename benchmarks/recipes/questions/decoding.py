"""Batched decoding behind a prefix that is read once; at any point an answer can be forced on a fork that leaves no trace."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

#: What asks for an answer on a fork, and how many tokens an answer has at most.
ASKED = " The answer is"
ANSWER = 6


@dataclass
class Line:
    """What was generated for one question: tokens, their log-probabilities, and whether the line came to its end."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    #: Answers forced on forks, with how many tokens of the line stood before each.
    forced: list[tuple[int, "Line"]] = field(default_factory=list)


class Asker:
    """SmolLM2 behind solved questions, whose keys and values all rows share.

    Parameters
    ----------
    model, tokenizer
        Those of `riskcal_adapters.torch.smollm2.smollm2_parts`.
    solved : str
        The solved questions, each on lines of its own.
    """

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, solved: str
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.ends = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        self.stops = self.ends.clone()  # of a forced answer
        for word, token in tokenizer.get_vocab().items():
            self.ends[token] = "Ċ" in word  # a line's end, as the vocabulary writes it
            self.stops[token] = "Ċ" in word or "." in word
        for ends in (self.ends, self.stops):
            ends[list(tokenizer.all_special_ids)] = True
        self.asked: list[int] = tokenizer.encode(ASKED)
        ids = torch.tensor([tokenizer.encode(solved)])
        self.length = ids.shape[1]
        with torch.inference_mode():
            read = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values.layers
            self.prefix = [(layer.keys[0], layer.values[0]) for layer in read]

    @torch.inference_mode()
    def lines(self, questions: Sequence[str], *, most: int, every: int = 0) -> list[Line]:
        """A greedy line for each question, all in step.

        Parameters
        ----------
        questions : sequence of str
            What follows the solved questions, up to where the line begins.
        most : int
            Tokens of a line at most.
        every : int, optional
            Force an answer on a fork before the first token and after every so many. 0: nowhere.
        """
        rows = [self.tokenizer.encode(question) for question in questions]
        said = [Line() for _ in rows]
        going = _Rows(self, rows, room=most + ANSWER + len(self.asked))
        alive = list(range(len(rows)))
        for step in range(most + 1):
            kept = [i for i, row in enumerate(alive) if not said[row].ended]
            if len(kept) <= len(alive) * 3 // 4:
                going.keep(kept)
                alive = [alive[i] for i in kept]
            if not kept:
                break
            if every and step % every == 0:
                for row, answer in zip(alive, self._forced(going), strict=True):
                    if not said[row].ended:
                        said[row].forced.append((step, answer))
            if step < most:
                self._say([said[row] for row in alive], going, self.ends)
        return said

    def _forced(self, going: "_Rows") -> list[Line]:
        """An answer of every row, on a fork."""
        fork = going.fork()
        fork.read(torch.tensor([self.asked] * len(fork.mask)))
        answers = [Line() for _ in fork.mask]
        for _ in range(ANSWER):
            self._say(answers, fork, self.stops)
            if all(answer.ended for answer in answers):
                break
        return answers

    def _say(self, said: Sequence[Line], going: "_Rows", ends: Tensor) -> None:
        """Add the likeliest token to every line that has not ended, and read it."""
        logprobs = going.logits.log_softmax(-1)
        best, token = logprobs.max(-1)
        over = ends[token].tolist()
        for line, chosen, logprob, end in zip(
            said, token.tolist(), best.tolist(), over, strict=True
        ):
            if not line.ended:
                line.tokens.append(chosen)
                line.logprobs.append(logprob)
                line.ended = end
        going.read(token[:, None])


class _Rows:
    """Rows in step: keys and values of what each has read behind the prefix, left-padded, and the logits of what comes next."""

    def __init__(self, asker: Asker, rows: Sequence[Sequence[int]], room: int) -> None:
        width = max(map(len, rows))
        config = asker.model.config
        kept = (len(rows), config.num_key_value_heads, width + room, config.head_dim)
        self.asker, self.at = asker, 0
        self.own = [(torch.zeros(kept), torch.zeros(kept)) for _ in asker.prefix]
        self.mask = torch.zeros(len(rows), width + room, dtype=torch.bool)
        self.position = torch.full((len(rows), 1), asker.length - 1)
        self.logits = torch.empty(0)
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        read = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
        self.read(ids, read)

    def fork(self) -> "_Rows":
        """Rows that go on from here by themselves; they share memory behind this point, which this one overwrites later."""
        other = object.__new__(_Rows)
        other.__dict__.update(self.__dict__)
        other.mask = self.mask.clone()
        return other

    def keep(self, rows: Sequence[int]) -> None:
        self.own = [(keys[rows], values[rows]) for keys, values in self.own]
        self.mask, self.position = self.mask[rows], self.position[rows]
        self.logits = self.logits[rows]

    def read(self, ids: Tensor, held: Tensor | None = None) -> None:
        """Read tokens (rows, n); ``held`` says which of them are no padding."""
        count = ids.shape[1]
        held = torch.ones_like(ids, dtype=torch.bool) if held is None else held
        end = self.at + count
        self.mask[:, self.at : end] = held
        positions = self.position + held.cumsum(1)
        self.position = positions[:, -1:]
        before = torch.arange(end) <= torch.arange(self.at, end)[:, None]
        seen = (self.mask[:, None, :end] & before)[:, None, None]
        self.logits = self._forward(ids, positions.clamp(min=self.asker.length), seen)
        self.at = end

    def _forward(self, ids: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        model = self.asker.model.model
        state = model.embed_tokens(ids)
        turned = model.rotary_emb(state, positions)
        for layer, prefix, own in zip(model.layers, self.asker.prefix, self.own, strict=True):
            state = state + self._attention(
                layer.self_attn, layer.input_layernorm(state), turned, prefix, own, seen
            )
            state = state + layer.mlp(layer.post_attention_layernorm(state))
        return self.asker.model.lm_head(model.norm(state[:, -1])).float()

    def _attention(
        self,
        attention: torch.nn.Module,
        state: Tensor,
        turned: tuple[Tensor, Tensor],
        prefix: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        seen: Tensor,
    ) -> Tensor:
        """Attention over the shared prefix and a row's own past, which are not copied together."""
        rows, count, _ = state.shape
        width = attention.head_dim
        heads = (
            part(state).view(rows, count, -1, width).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries, keys, values = heads
        queries, keys = apply_rotary_pos_emb(queries, keys, *turned)
        end = seen.shape[-1]
        own[0][:, :, end - count : end] = keys
        own[1][:, :, end - count : end] = values
        groups = keys.shape[1]
        grouped = queries.reshape(rows, groups, -1, count, width) * attention.scaling
        shared = torch.einsum("bgrnd,gpd->bgrnp", grouped, prefix[0])
        past = torch.einsum("bgrnd,bgtd->bgrnt", grouped, own[0][:, :, :end])
        scores = torch.cat([shared, past.masked_fill(~seen, -torch.inf)], -1).softmax(-1)
        weights, rest = scores.split([shared.shape[-1], end], -1)
        out = torch.einsum("bgrnp,gpd->bgrnd", weights, prefix[1])
        out = out + torch.einsum("bgrnt,bgtd->bgrnd", rest, own[1][:, :, :end])
        return attention.o_proj(out.reshape(rows, -1, count, width).transpose(1, 2).flatten(2))
