"""Queueing formulas with known answers: what the simulator is checked against, and a sanity check beside the planner's answer.

Times are in any one unit, as long as rates are per the same unit. `rate` is the arrival rate of a Poisson process, `mean` the mean
service time, `servers` the number of equal servers. Waiting counts until service begins, sojourn until it ends. A system that
cannot keep up has infinite means.

Sources, by function: A. K. Erlang, 1917 (`erlang_b`, `erlang_c`, `mmc_*`); F. Pollaczek, 1930, and A. Khinchine, 1932
(`mg1_wait`); A. Cobham, "Priority assignment in waiting line problems", 1954, and T. E. Phipps, "Machine repair as a priority
waiting-line problem", 1956 (`mg1_shortest_first_wait`); C. D. Crommelin, 1932, and N. T. J. Bailey, 1954 (`mdc_wait`);
J. W. Cohen, "The multiple phase service network with generalized processor sharing", 1979 (`shared_sojourn`); A. O. Allen,
"Probability, Statistics and Queueing Theory", 1978 (`allen_cunneen_wait`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()
_GRID = 20_000
_TINY = 1e-12
_TURNS = 20_000


class TheoryError(ValueError):
    """A formula was asked about a system that cannot be; names the parameter and the remedy."""


@dataclass(frozen=True, slots=True)
class Service:
    """A distribution of service times, by what the formulas need of it."""

    mean: float
    scv: float
    """Squared coefficient of variation: variance / mean^2; 0 for constant times, 1 for exponential ones."""
    lorenz: Callable[[float], float] | None = None
    """Share of all work that the shortest `u` of the jobs bring, u from 0 to 1; None: not known."""

    def __post_init__(self) -> None:
        _check(mean=self.mean)
        if not self.scv >= 0:
            raise TheoryError(f"scv: must be at least 0, got {self.scv}; 0 means constant service times")

    @property
    def second_moment(self) -> float:
        """Mean of the squared service time."""
        return self.mean**2 * (1 + self.scv)


def constant(mean: float) -> Service:
    """Return service times that are all the same."""
    return Service(mean, 0.0, lambda share: share)


def exponential(mean: float) -> Service:
    """Return exponential service times."""
    return Service(mean, 1.0, lambda share: share + (1 - share) * math.log1p(-share) if share < 1 else 1.0)


def lognormal(mean: float, sigma: float) -> Service:
    """Return lognormal service times; `sigma` is the standard deviation of their logarithm."""
    if not sigma > 0:
        raise TheoryError(f"sigma: must be greater than 0, got {sigma}; use `constant` for times that are all the same")

    def lorenz(share: float) -> float:
        return _NORMAL.cdf(_NORMAL.inv_cdf(share) - sigma) if 0 < share < 1 else share

    return Service(mean, math.expm1(sigma * sigma), lorenz)


# --- many servers, exponential service ------------------------------------------------------------------------------


def erlang_b(servers: int, offered: float) -> float:
    """Return the share of arrivals that find all servers busy where nobody waits. `offered` = rate x mean service time."""
    _check_load(servers, offered)
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    return blocked


def erlang_c(servers: int, offered: float) -> float:
    """Return the chance that an arrival has to wait in M/M/c; 1 when the servers cannot keep up."""
    _check_load(servers, offered)
    if offered >= servers:
        return 1.0
    blocked = erlang_b(servers, offered)
    return servers * blocked / (servers - offered * (1 - blocked))


def mmc_wait(servers: int, rate: float, mean: float) -> float:
    """Return the mean waiting time in M/M/c, in any order of service that does not look at service times."""
    _check(rate=rate, mean=mean)
    offered = rate * mean
    if offered >= servers:
        return math.inf
    return erlang_c(servers, offered) * mean / (servers - offered)


def mmc_wait_above(servers: int, rate: float, mean: float, wait: float) -> float:
    """Return the chance of waiting longer than `wait` in M/M/c, first come first served."""
    _check(rate=rate, mean=mean)
    offered = rate * mean
    if wait < 0 or offered >= servers:
        return 1.0
    return erlang_c(servers, offered) * math.exp(-(servers - offered) * wait / mean)


def mmc_wait_quantile(servers: int, rate: float, mean: float, share: float) -> float:
    """Return the waiting time that `share` of the arrivals do not exceed in M/M/c, first come first served."""
    _check(rate=rate, mean=mean)
    if not 0 <= share < 1:
        raise TheoryError(f"share: must be at least 0 and below 1, got {share}")
    offered = rate * mean
    if offered >= servers:
        return math.inf
    waits = erlang_c(servers, offered)
    if waits <= 1 - share:
        return 0.0
    return mean / (servers - offered) * math.log(waits / (1 - share))


def erlang_c_servers(rate: float, mean: float, share: float, wait: float, most: int = 1_000_000) -> int:
    """Return the fewest servers with which `share` of the arrivals wait no longer than `wait` in M/M/c.

    Raises TheoryError when `most` are not enough.
    """
    _check(rate=rate, mean=mean)
    count = max(1, math.floor(rate * mean) + 1)
    while count <= most:
        if mmc_wait_quantile(count, rate, mean, share) <= wait:
            return count
        count += 1
    raise TheoryError(f"most: {most} servers are not enough for {rate * mean:.6g} Erlang; raise it or ask for less")


# --- one server, any service ----------------------------------------------------------------------------------------


def mg1_wait(rate: float, service: Service) -> float:
    """Return the mean waiting time in M/G/1, in any order of service that does not look at service times."""
    _check(rate=rate)
    load = rate * service.mean
    return rate * service.second_moment / (2 * (1 - load)) if load < 1 else math.inf


def mg1_shortest_first_wait(rate: float, service: Service) -> float:
    """Return the mean waiting time in M/G/1 where the shortest that waits goes first and nobody is interrupted.

    Integrates the waiting time of each share of the jobs, R / (1 - rho L(u))^2, where R is the work left of the job in service,
    and L(u) the share of the work that the shorter ones bring. Infinite once there is too much work, though short ones do get
    served.
    """
    _check(rate=rate)
    load = rate * service.mean
    if load >= 1:
        return math.inf
    lorenz = service.lorenz
    if lorenz is None:
        raise TheoryError("service.lorenz: the order by length needs the distribution; use exponential or lognormal")
    if service.scv == 0:
        return mg1_wait(rate, service)
    shares = (np.arange(_GRID) + 0.5) / _GRID
    shorter = np.array([lorenz(float(share)) for share in shares])
    return rate * service.second_moment / 2 * float(np.mean(1 / (1 - load * shorter) ** 2))


def processor_sharing_sojourn(rate: float, mean: float) -> float:
    """Return the mean sojourn in M/G/1 under processor sharing: the same for every distribution of the service time."""
    _check(rate=rate, mean=mean)
    load = rate * mean
    return mean / (1 - load) if load < 1 else math.inf


def shared_sojourn(rate: float, mean: float, marginal: float, most: int = 100_000) -> float:
    """Return the mean sojourn in one Pod that takes everybody at once, where each further task adds `marginal` to a step's time.

    n tasks together each go 1 - marginal + n x marginal times slower than alone, so that the Pod works off n / (that) seconds of
    work per second. Generalised processor sharing: the same for every distribution of the service time. `marginal` 1 is plain
    processor sharing, 0 a server for each. Sums the probabilities of up to `most` tasks.
    """
    _check(rate=rate, mean=mean)
    if not 0 <= marginal <= 1:
        raise TheoryError(f"marginal: must lie between 0 and 1, got {marginal}")
    load = rate * mean
    if load * marginal >= 1:
        return math.inf
    term, total, weighted = 1.0, 1.0, 0.0
    for count in range(1, most + 1):
        term *= load * (1 - marginal + marginal * count) / count
        total += term
        weighted += count * term
        if count > load and term * count < _TINY * weighted:
            break
    return weighted / total / rate


# --- many servers, other service ------------------------------------------------------------------------------------


def mdc_wait(servers: int, rate: float, mean: float) -> float:
    """Return the mean waiting time in M/D/c, first come first served: exact.

    Whoever is in service now is gone one service time later, so the number in the system is a bulk queue. Its mean follows from the
    roots inside the unit circle of z^c = exp(a (z - 1)), a the offered load, which repeated substitution finds.
    """
    _check(rate=rate, mean=mean)
    offered = rate * mean
    _check_load(servers, offered)
    if offered >= servers:
        return math.inf
    turns = np.exp(2j * np.pi * np.arange(1, servers) / servers)
    roots = np.zeros(servers - 1, dtype=np.complex128)
    for _ in range(_TURNS):
        before, roots = roots, turns * np.exp(offered / servers * (roots - 1))
        if not len(roots) or np.abs(roots - before).max() < _TINY:
            break
    own = (offered**2 - servers * (servers - 1)) / (2 * (servers - offered))
    return max(0.0, own + float(np.sum(1 / (1 - roots)).real)) / rate


def allen_cunneen_wait(servers: int, rate: float, mean: float, arrival_scv: float, service_scv: float) -> float:
    """Return the approximate mean waiting time in G/G/c: that of M/M/c times the mean of the two squared variations.

    Exact for M/M/c and M/G/1. Without regard for correlation: bursty arrivals whose gaps depend on each other wait longer.
    """
    for name, value in (("arrival_scv", arrival_scv), ("service_scv", service_scv)):
        if not value >= 0:
            raise TheoryError(f"{name}: must be at least 0, got {value}")
    return mmc_wait(servers, rate, mean) * (arrival_scv + service_scv) / 2


def _check(**positive: float) -> None:
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise TheoryError(f"{name}: must be greater than 0 and finite, got {value}")


def _check_load(servers: int, offered: float) -> None:
    if servers < 1:
        raise TheoryError(f"servers: must be at least 1, got {servers}")
    if not 0 <= offered < math.inf:
        raise TheoryError(f"offered: must be at least 0 Erlang and finite, got {offered}")
