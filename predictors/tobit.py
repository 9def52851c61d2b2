"""What an end that was cut off still says: a step of Tobit's likelihood for a normal that is known only to exceed a bound."""

from __future__ import annotations

import math


def beyond(bound: float) -> tuple[float, float]:
    """Return the pseudo-observation and its weight for a standard normal known to exceed ``bound``.

    The weight is the Fisher information that is left, within (0, 1): near 0 for a bound far below, near 1 for one far above. An
    ordinary observation of that value and weight moves an estimate as the censored likelihood would.
    """
    if bound > 30.0:
        hazard = bound + 1.0 / bound - 2.0 / bound**3
    else:
        above = 0.5 * math.erfc(bound / math.sqrt(2.0))
        hazard = math.exp(-0.5 * bound * bound) / math.sqrt(2.0 * math.pi) / above
    return 1.0 / (hazard - bound), min(1.0, max(0.0, hazard * (hazard - bound)))
