"""Per-head thresholds: Valade's rule (2024), and thresholds at which the agreement of a cascade of heads is certified.

A head is an exit with a threshold of its own. A token leaves at the first head whose confidence reaches its threshold, and
*agrees* if that head's token is the full model's. The pooled agreement of a head is the expected number of agreeing tokens
that leave there over the expected number of tokens that leave there: long prompts count for more. A learned risk gives all heads
their thresholds by one number, the largest risk of being wrong that is run.
"""

from riskcal.heads.certified import certified as certified
from riskcal.heads.learned import LearnedRisk as LearnedRisk
from riskcal.heads.learned import RiskMap as RiskMap
from riskcal.heads.learning import learn_risk as learn_risk
from riskcal.heads.loss import request_loss as request_loss
from riskcal.heads.result import HeadCalibration as HeadCalibration
from riskcal.heads.rule import self_supervised as self_supervised
