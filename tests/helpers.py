"""What several tests share: one definition of each world, list and yardstick."""

import math


def allowed(level: float, draws: int) -> float:
    """The share of errors up to which a Monte Carlo test accepts a true rate of ``level``: three standard errors above it."""
    return level + 3 * math.sqrt(level * (1 - level) / draws)
