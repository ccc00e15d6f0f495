"""How sure each row is after a layer: the policy's measure on the states and logits of the step at hand."""

import torch
from torch import Tensor

from riskcal.policy import ExitPolicy
from riskcal_adapters.torch import kernels, measures
from riskcal_adapters.torch.heads import Head
from riskcal_adapters.torch.measures import Classifier, Confidences
from riskcal_adapters.torch.scores import Scores

#: Measures that contrast a layer's logits with an earlier layer's; ``-code`` as the authors' code scales them.
CONTRASTIVE = ("weighted", "contrastive", "contrastive-code", "jsd", "jsd-code")
MEASURES = (*measures.OF_LOGITS, *measures.OF_STATES, "oracle", *CONTRASTIVE)


class Judge:
    """Judges the layers of one position after the other, for a batch whose rows share a measure.

    Parameters
    ----------
    head : riskcal_adapters.torch.heads.Head
        What states are scored with, where the measure is one of scores; positions and rows are told to it from here.
    policy : ExitPolicy
        Its measure and contrast.
    classifier : Classifier, optional
        Needed by the measure of that name.
    """

    def __init__(
        self, head: Head, policy: ExitPolicy, classifier: Classifier | None = None
    ) -> None:
        measure = policy.named().measure
        assert measure is not None
        self._head, self._classifier = head, classifier
        self._measure, self._contrast = measure, policy.contrast
        self._remembers = measure in CONTRASTIVE
        self.begin()

    def begin(self, targets: Tensor | None = None) -> None:
        """Start a position; ``targets`` (B,) are the last layer's tokens, where the measure is the oracle."""
        self._head.begin()
        self._targets = targets
        self._confidence: Confidences | None = None  # of the last exit looked at
        self._first = 0  # the first layer looked at
        self._states: list[Tensor] = []
        self._logits: dict[int, Tensor] = {}

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows of the batch, in this order."""
        self._head.keep(rows)
        self._targets = None if self._targets is None else self._targets.index_select(0, rows)
        self._states = [state.index_select(0, rows) for state in self._states]
        self._logits = {
            layer: logits.index_select(0, rows) for layer, logits in self._logits.items()
        }
        if self._confidence is not None:
            self._confidence = self._confidence[rows.cpu().numpy()]

    def pass_by(self, state: Tensor) -> None:
        """A layer at which nothing can exit."""
        if self._remembers:
            self._states.append(state)

    def look(
        self, layer: int, state: Tensor, before: Tensor | None
    ) -> tuple[Confidences, Scores | None]:
        """Confidence after a layer, and its scores where the measure needed them.

        It is kept for the next exit's head, which may shrink with it, and, of a contrastive measure, with the state.

        Parameters
        ----------
        layer : int
            From 1.
        state, before : (B, d)
            Raw states after this layer and the one before; None at the first.
        """
        scores = self._scores(layer, state)
        if scores is None or kernels.take(scores.logits):
            if self._measure in measures.OF_LOGITS and scores is not None:
                confidence, best = measures.surest(self._measure, scores.logits)
                if scores.ids is None:
                    scores = Scores(scores.logits, None, best)
            else:
                confidence = measures.read(self._of(layer, state, before, scores))
        else:  # where a read is a wait, one brings the tokens too
            found = self._of(layer, state, before, scores)
            confidence, best = measures.read_both(found, scores.best())
            scores = Scores(scores.logits, scores.ids, best)
        self._confidence = confidence
        return confidence, scores

    def measured(
        self, layer: int, state: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Scores | None]:
        """As `look`, with confidences that stay where states are: nobody waits. Not for heads that shrink with confidence."""
        scores = self._scores(layer, state)
        return self._of(layer, state, before, scores), scores

    def _scores(self, layer: int, state: Tensor) -> Scores | None:
        """Where the measure needs them."""
        self._first = self._first or layer
        if self._measure in measures.OF_STATES:
            return None
        return self._head.scores(layer, state, self._confidence)

    def _of(
        self, layer: int, state: Tensor, before: Tensor | None, scores: Scores | None
    ) -> Tensor:
        """Confidence after a layer; it is remembered for those that are contrasted with it."""
        if self._measure == "state":
            return measures.saturation(state, before)
        if scores is None:
            assert self._classifier is not None
            return measures.classifier_probability(state, self._classifier)
        confidence = self._of_scores(layer, scores)
        self.pass_by(state)
        return confidence

    def _of_scores(self, layer: int, scores: Scores) -> Tensor:
        if self._measure == "oracle":
            assert self._targets is not None
            return (scores.best() == self._targets).float()
        if self._measure in measures.OF_LOGITS:
            return measures.OF_LOGITS[self._measure](scores.logits)
        if scores.ids is None:
            self._logits[layer] = scores.logits
        earlier = self._amateurs(layer)
        if not earlier:
            return measures.margin(scores.logits)
        expert = scores.logits
        probabilities = torch.softmax(expert, -1, dtype=torch.float32)
        # the tokens that are contrasted, which the literature calls the head
        head = self._plausible(layer, expert, probabilities)
        if "jsd" in self._measure:
            amateur = self._most_distant(layer, earlier, scores, probabilities, head)
        else:
            amateur = self._again(earlier[0], scores)
        return measures.contrasted(
            expert,
            amateur,
            head,
            tail=self._measure != "weighted",
            mass=not self._measure.endswith("-code"),
        )

    def _amateurs(self, layer: int) -> list[int]:
        """Earlier layers that may be contrasted with this one."""
        if "jsd" not in self._measure:
            return [layer // 2] if layer >= 2 else []
        first = 2 if self._measure == "jsd-code" else max(2, self._first)
        return list(range(first, layer))

    def _plausible(self, layer: int, expert: Tensor, probabilities: Tensor) -> Tensor:
        contrast, kept = self._contrast, ~expert.isneginf()
        if contrast.plausible == "kept":
            return kept
        if contrast.alpha_decay == 0:
            return measures.plausible(probabilities, contrast.alpha)
        doubt = measures.doubt(probabilities)
        alpha = measures.alpha_at(contrast.alpha, contrast.alpha_decay, layer, doubt)
        # a margin of 1 makes alpha 0, and all tokens plausible
        return measures.plausible(probabilities, alpha) & kept

    def _most_distant(
        self, layer: int, earlier: list[int], scores: Scores, probabilities: Tensor, head: Tensor
    ) -> Tensor:
        """Each row's amateur: the earlier layer of the largest divergence on the plausible tokens per layer of distance."""
        candidates = torch.stack([self._again(number, scores) for number in earlier])
        expert = probabilities.masked_fill(~head, 0.0)
        discounted = [
            measures.divergence(
                expert, torch.softmax(logits, -1, dtype=torch.float32).masked_fill(~head, 0.0)
            )
            / (layer - number)
            for number, logits in zip(earlier, candidates, strict=True)
        ]
        chosen = torch.stack(discounted).argmax(0)
        return candidates[chosen, torch.arange(len(chosen), device=chosen.device)]

    def _again(self, layer: int, scores: Scores) -> Tensor:
        """An earlier layer's logits over the tokens that are compared now."""
        if scores.ids is not None:
            return self._head.again(layer, self._states[layer - 1])
        if layer not in self._logits:
            self._logits[layer] = self._head.again(layer, self._states[layer - 1])
        return self._logits[layer]
