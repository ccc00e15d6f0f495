"""What a service needs around certified policies. Pure Python: an engine of any framework calls it."""

from riskcal.forbidden import Inside as Inside
from riskcal.forbidden import Pattern as Pattern
from riskcal.forbidden import Tokens as Tokens
from riskcal.monitor import alarm_delays as alarm_delays
from riskcal.serving.book import PolicyBook as PolicyBook
from riskcal.serving.book import Route as Route
from riskcal.serving.check import ModelFacts as ModelFacts
from riskcal.serving.check import check_policy as check_policy
from riskcal.serving.drift import Drift as Drift
from riskcal.serving.drift import Drifted as Drifted
from riskcal.serving.estimates import Interval as Interval
from riskcal.serving.estimates import mean_interval as mean_interval
from riskcal.serving.events import EventLog as EventLog
from riskcal.serving.metrics import MetricsCollector as MetricsCollector
from riskcal.serving.reader import Events as Events
from riskcal.serving.reader import read_events as read_events
from riskcal.serving.shadow import Shadow as Shadow
from riskcal.serving.strata import Strata as Strata
from riskcal.serving.strata import Stratum as Stratum
from riskcal.serving.switch import KillSwitch as KillSwitch
from riskcal.serving.watch import EventWatch as EventWatch
