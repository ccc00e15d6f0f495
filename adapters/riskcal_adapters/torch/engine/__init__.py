"""Many requests in flight, each at its own layer and position.

A `Request` is taken as a `Flight`, enters the `Slots` as a `Newcomer`, comes out as `Ended`, and is answered by a `Done`.
"""

from riskcal_adapters.torch.engine.engine import Engine as Engine
from riskcal_adapters.torch.engine.for_recording import DepthWise as DepthWise
from riskcal_adapters.torch.engine.requests import Done as Done
from riskcal_adapters.torch.engine.requests import Request as Request
from riskcal_adapters.torch.engine.stats import EngineStats as EngineStats
