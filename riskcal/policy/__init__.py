"""What a decoder is told: `ExitPolicy`, its parts, its certificate, and its columns in a table."""

from riskcal.policy.certificate import Asked as Asked
from riskcal.policy.certificate import Certificate as Certificate
from riskcal.policy.certificate import OfClass as OfClass
from riskcal.policy.certificate import ids_digest as ids_digest
from riskcal.policy.certificate import versions as versions
from riskcal.policy.columns import CANDIDATE_COLUMNS as CANDIDATE_COLUMNS
from riskcal.policy.columns import DEFAULTS as DEFAULTS
from riskcal.policy.columns import SCHEDULE_COLUMNS as SCHEDULE_COLUMNS
from riskcal.policy.exit_policy import ExitPolicy as ExitPolicy
from riskcal.policy.fields import Contrast as Contrast
from riskcal.policy.fields import RiskLimit as RiskLimit
from riskcal.policy.fields import Sampling as Sampling
from riskcal.policy.fields import Stop as Stop
from riskcal.policy.fields import calibrated_fields as calibrated_fields
from riskcal.policy.fields import refusal as refusal
from riskcal.policy.pruning import Pruning as Pruning
from riskcal.policy.schedules import Constant as Constant
from riskcal.policy.schedules import Decaying as Decaying
from riskcal.policy.schedules import Schedule as Schedule
