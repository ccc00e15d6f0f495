"""Recording what early exit loses and costs: `record`, and what it asks of a decoder and of a pool."""

from riskcal_adapters.recording.generations import generations as generations
from riskcal_adapters.recording.protocol import Decoder as Decoder
from riskcal_adapters.recording.protocol import Generation as Generation
from riskcal_adapters.recording.protocol import Pool as Pool
from riskcal_adapters.recording.record import record as record
