"""Training a T5 whose every decoder layer can be the last, and exits and their heads for a causal language model.

Read in this order: ``confidence`` (what an exit is decided by), ``forward`` (one teacher-forced pass, plain, exit-aware or
with layers dropped), ``losses``, ``classifier`` (the learned measure), ``trainer`` (Hugging Face's, with these losses). Heads:
``self_generated`` (the text), ``head_states`` (what heads read and should say), ``head_losses``, ``exit_heads``. Exits of a
causal model by low-rank adapters: ``low_rank``, ``causal_forward`` (one pass over known text), ``divergence``, ``tuning``.
"""

from riskcal_adapters.torch.training.causal_forward import causal_pass as causal_pass
from riskcal_adapters.torch.training.classifier import ExitClassifier as ExitClassifier
from riskcal_adapters.torch.training.classifier import (
    classifier_confidence as classifier_confidence,
)
from riskcal_adapters.torch.training.classifier import load_classifier as load_classifier
from riskcal_adapters.torch.training.classifier import save_classifier as save_classifier
from riskcal_adapters.torch.training.confidence import pruned_margin as pruned_margin
from riskcal_adapters.torch.training.confidence import softmax_margin as softmax_margin
from riskcal_adapters.torch.training.confidence import state_saturation as state_saturation
from riskcal_adapters.torch.training.divergence import ExitQuality as ExitQuality
from riskcal_adapters.torch.training.divergence import exit_quality as exit_quality
from riskcal_adapters.torch.training.exit_heads import train_heads as train_heads
from riskcal_adapters.torch.training.forward import decoder_pass as decoder_pass
from riskcal_adapters.torch.training.forward import dropout_rates as dropout_rates
from riskcal_adapters.torch.training.forward import teacher_forced as teacher_forced
from riskcal_adapters.torch.training.head_losses import confidence_ceiling as confidence_ceiling
from riskcal_adapters.torch.training.head_losses import head_loss as head_loss
from riskcal_adapters.torch.training.head_losses import head_targets as head_targets
from riskcal_adapters.torch.training.head_states import HeadAnswers as HeadAnswers
from riskcal_adapters.torch.training.head_states import HeadStates as HeadStates
from riskcal_adapters.torch.training.head_states import head_answers as head_answers
from riskcal_adapters.torch.training.head_states import head_states as head_states
from riskcal_adapters.torch.training.losses import consistency_labels as consistency_labels
from riskcal_adapters.torch.training.losses import do_not_exit_f1 as do_not_exit_f1
from riskcal_adapters.torch.training.losses import geometric_loss as geometric_loss
from riskcal_adapters.torch.training.losses import independent_loss as independent_loss
from riskcal_adapters.torch.training.losses import layer_weighted_loss as layer_weighted_loss
from riskcal_adapters.torch.training.losses import layer_weights as layer_weights
from riskcal_adapters.torch.training.low_rank import LowRankAdapters as LowRankAdapters
from riskcal_adapters.torch.training.low_rank import load_adapters as load_adapters
from riskcal_adapters.torch.training.low_rank import save_adapters as save_adapters
from riskcal_adapters.torch.training.self_generated import Sequences as Sequences
from riskcal_adapters.torch.training.self_generated import self_generate as self_generate
from riskcal_adapters.torch.training.tuning import TuningProgress as TuningProgress
from riskcal_adapters.torch.training.tuning import tune_exits as tune_exits
