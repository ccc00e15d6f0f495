"""Adapters that drive early-exit decoders and write the records that riskcal calibrates on."""

from riskcal_adapters.recording import Decoder as Decoder
from riskcal_adapters.recording import Generation as Generation
from riskcal_adapters.recording import generations as generations
from riskcal_adapters.recording import record as record
