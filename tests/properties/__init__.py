"""Properties: what must hold for everything that a strategy can make.

``HYPOTHESIS_PROFILE=thorough`` tries many times as many examples, other ones each time.
"""

import os

from hypothesis import HealthCheck, settings

_SLOW_DRAWS = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60, suppress_health_check=_SLOW_DRAWS)
settings.register_profile("thorough", deadline=None, max_examples=3000, suppress_health_check=_SLOW_DRAWS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def reduced(factor: int) -> int:
    """Return a part of the profile's number of examples, for tests whose examples are slow."""
    return settings().max_examples // factor
