"""Commands that the adapters add to `riskcal`."""

from riskcal_adapters.cli.decoders import NamedDecoder as NamedDecoder
from riskcal_adapters.cli.decoders import parse_decoder as parse_decoder
from riskcal_adapters.cli.generate import generate as generate
from riskcal_adapters.cli.prompts import read_prompts as read_prompts
from riskcal_adapters.cli.recalibrate import recalibrate as recalibrate
from riskcal_adapters.cli.record import MOST_THRESHOLDS as MOST_THRESHOLDS
from riskcal_adapters.cli.record import parse_thresholds as parse_thresholds
from riskcal_adapters.cli.record import record as record
