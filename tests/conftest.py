"""Settings for every property test: a deadline would assert on the time of a busy machine."""

from hypothesis import settings

settings.register_profile("riskcal", settings.default, deadline=None)
settings.load_profile("riskcal")
