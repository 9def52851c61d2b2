"""What company costs a run: how much longer it takes for each other task in its Pod, learned from runs whose Pods measured both.

A Pod says what a run would have taken alone and how many others were there on average. The cost of one more is kept by model and
picture size, by model, and over all, as a ratio of decayed sums, so that a few strange runs weigh little; nothing is said before a
model, or ten runs of any, were seen.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from engine.tasks import Micros

MEMORY = 0.98
"""What a run counts of what the next one counts: about the last 50 decide."""
MOST_KEYS = 10_000
LEAST_COMPANY_PERMILLE = 100
"""Runs with less company than this say too little."""
_ENOUGH = 10.0
_Key = tuple[str, int]
_ALL: _Key = ("", 0)


class CompanyCost:
    """The cost of one more task in a Pod, learned online. Deterministic; saves and restores to the bit."""

    def __init__(self) -> None:
        self._sums: OrderedDict[_Key, tuple[float, float, float]] = OrderedDict()
        """Key -> decayed sums of excess and company, and of runs."""

    def observe(self, model: str, pixels: int, run_us: Micros, alone_us: Micros, company_permille: int) -> None:
        """Take in a finished run."""
        if alone_us <= 0 or run_us < alone_us or company_permille < LEAST_COMPANY_PERMILLE:
            return
        excess, company = run_us / alone_us - 1.0, company_permille / 1000.0
        for key in dict.fromkeys([(model, pixels), (model, 0), _ALL]):
            old_excess, old_company, runs = self._sums.get(key, (0.0, 0.0, 0.0))
            self._sums[key] = (old_excess * MEMORY + excess, old_company * MEMORY + company, runs * MEMORY + 1.0)
            self._sums.move_to_end(key)
        while len(self._sums) > MOST_KEYS:
            self._sums.popitem(last=False)

    def marginal_permille(self, model: str, pixels: int) -> int:
        """Return how many thousandths of its time alone a run takes longer for each other task in its Pod; 0 when unknown."""
        for key in ((model, pixels), (model, 0)):
            if key in self._sums:
                return self._ratio(key)
        if self._sums.get(_ALL, (0.0, 0.0, 0.0))[2] >= _ENOUGH:
            return self._ratio(_ALL)
        return 0

    def _ratio(self, key: _Key) -> int:
        excess, company, _ = self._sums[key]
        return max(1, round(1000 * excess / company))

    def to_json(self) -> list[Any]:
        """Return what `restore` reads."""
        return [[*key, *sums] for key, sums in self._sums.items()]

    def restore(self, plain: list[Any]) -> None:
        """Take over what `to_json` returned."""
        self._sums = OrderedDict(
            ((str(model), int(pixels)), (float(excess), float(company), float(runs)))
            for model, pixels, excess, company, runs in plain
        )
