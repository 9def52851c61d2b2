"""The orderings that come with the engine, by the names that profiles call them by."""

from __future__ import annotations

from engine.levels.ordering import ByPriority, Fair, Fifo, Policy
from engine.levels.orderings.by_time import Edf, Gittins, Las, Sept, Sjf, Srtf
from engine.levels.orderings.sharing import Drf, FairShare, Themis

ORDERINGS: dict[str, type[Policy]] = {
    "fifo": Fifo,
    "priority": ByPriority,
    "fair": Fair,
    "sjf": Sjf,
    "sept": Sept,
    "srtf": Srtf,
    "gittins": Gittins,
    "las": Las,
    "edf": Edf,
    "fair-share": FairShare,
    "drf": Drf,
    "themis": Themis,
}
