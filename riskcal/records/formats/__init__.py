"""Readers of other systems' logs, one file a system, from the names that its own code writes."""

from riskcal.records.formats import lm_eval as lm_eval
from riskcal.records.formats import otel as otel
from riskcal.records.formats import reasoning as reasoning
from riskcal.records.formats import vllm as vllm
