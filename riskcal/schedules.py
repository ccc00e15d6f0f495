"""The schedules of `riskcal.policy`, under the name by which users import them."""

from riskcal.policy.schedules import Constant as Constant
from riskcal.policy.schedules import Decaying as Decaying
from riskcal.policy.schedules import Schedule as Schedule
