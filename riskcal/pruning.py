"""The pruned head of `riskcal.policy`, under the name by which users import it."""

from riskcal.policy.pruning import Pruning as Pruning
