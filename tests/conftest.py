"""For all tests: hypothesis keeps no time, since a shared machine may stall any example."""

from hypothesis import settings

settings.register_profile("house", deadline=None)
settings.load_profile("house")
