"""Boosted trees as flat arrays: fitted by scikit-learn off the path, walked in a few numpy calls for one row or for many.

A library's own call for a single row takes milliseconds. Here every split of every tree is compared at once; a split that a row
fails strikes out the leaves on its left, and the first leaf that remains of each tree is the row's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAVES = 16
"""The most leaves of a tree: one bit each of a 16-bit mask."""
_ALL = 0xFFFF
_ROWS_AT_ONCE = 512
_TOTAL_RATE = 4.8
"""Learning rate times trees: fewer trees take larger steps."""


def _first_left() -> NDArray[np.int8]:
    left = np.arange(_ALL, 0, -1)
    return np.concatenate((np.log2(left & -left), [0])).astype(np.int8)


_FIRST_LEFT = _first_left()
"""By the leaves that were struck out, as a mask, the first one that was not."""


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """An additive model. ``features``, ``thresholds`` and ``struck`` have one entry per split, ``starts`` one per tree."""

    base: float
    features: NDArray[np.int64]
    thresholds: NDArray[np.float64]
    struck: NDArray[np.uint16]
    """Leaves that are struck out when the row's feature exceeds the threshold."""
    starts: NDArray[np.int64]
    values: NDArray[np.float64]
    """Of the leaves, `LEAVES` places for each tree."""
    offsets: NDArray[np.int64]
    by_feature: tuple[tuple[int, NDArray[np.float64], NDArray[np.uint16]], ...]
    """For many rows: of each feature its thresholds in order, and what a value above so many of them strikes out of every tree."""

    def predict(self, row: NDArray[np.float64]) -> float:
        """Return the model's value for one row of features."""
        if not len(self.starts):
            return self.base
        struck = (row.take(self.features) > self.thresholds) * self.struck
        leaves = _FIRST_LEFT.take(np.bitwise_or.reduceat(struck, self.starts))
        return self.base + float(np.add.reduce(self.values.take(self.offsets + leaves)))

    def predict_rows(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the model's values for rows of features, shape (rows, features)."""
        found = np.full(len(rows), self.base)
        if not len(self.starts):
            return found
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[begin : begin + _ROWS_AT_ONCE]
            struck = np.zeros((len(part), len(self.starts)), dtype=np.uint16)
            for feature, thresholds, by_place in self.by_feature:
                struck |= by_place[np.searchsorted(thresholds, part[:, feature])]
            found[begin : begin + len(part)] += self.values[self.offsets + _FIRST_LEFT[struck]].sum(axis=1)
        return found

    def state(self) -> dict[str, Any]:
        """Return the model as plain values."""
        return {
            "base": self.base,
            "features": self.features.tolist(),
            "thresholds": self.thresholds.tolist(),
            "masks": (_ALL - self.struck).tolist(),
            "starts": self.starts.tolist(),
            "values": self.values.tolist(),
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Trees:
        """Return the model that `state` described."""
        features = np.array(state["features"], dtype=np.int64)
        thresholds = np.array(state["thresholds"], dtype=np.float64)
        struck = (_ALL - np.array(state["masks"], dtype=np.int64)).astype(np.uint16)
        starts = np.array(state["starts"], dtype=np.int64)
        return cls(
            base=state["base"],
            features=features,
            thresholds=thresholds,
            struck=struck,
            starts=starts,
            values=np.array(state["values"], dtype=np.float64),
            offsets=np.arange(len(starts), dtype=np.int64) * LEAVES,
            by_feature=_by_feature(features, thresholds, struck, starts),
        )


def fit(rows: NDArray[np.float32], targets: NDArray[np.float64], rising: Sequence[int], trees: int = 40) -> Trees:
    """Fit boosted trees by least squares; their value never falls in the features whose places are ``rising``.

    The same rows give the same trees. Raises ImportError without scikit-learn, ValueError for fewer than two rows.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    constraints = [1 if place in set(rising) else 0 for place in range(rows.shape[1])]
    model = HistGradientBoostingRegressor(
        max_iter=trees,
        learning_rate=_TOTAL_RATE / trees,
        max_leaf_nodes=LEAVES,
        min_samples_leaf=20,
        l2_regularization=5.0,
        monotonic_cst=constraints,
        early_stopping=False,
        random_state=0,
    ).fit(rows, targets)
    return _flat(float(np.ravel(model._baseline_prediction)[0]), [stage[0].nodes for stage in model._predictors])


def _by_feature(
    features: NDArray[np.int64],
    thresholds: NDArray[np.float64],
    struck: NDArray[np.uint16],
    starts: NDArray[np.int64],
) -> tuple[tuple[int, NDArray[np.float64], NDArray[np.uint16]], ...]:
    tree_of = np.searchsorted(starts, np.arange(len(features)), side="right") - 1
    tables = []
    for feature in np.unique(features):
        splits = np.flatnonzero(features == feature)
        splits = splits[np.argsort(thresholds[splits], kind="stable")]
        table = np.zeros((len(splits) + 1, len(starts)), dtype=np.uint16)
        table[np.arange(1, len(splits) + 1), tree_of[splits]] = struck[splits]
        tables.append((int(feature), thresholds[splits], np.bitwise_or.accumulate(table, axis=0)))
    return tuple(tables)


def _flat(base: float, trees: Sequence[Any]) -> Trees:
    state: dict[str, Any] = {"features": [], "thresholds": [], "masks": [], "starts": [], "values": []}
    for nodes in trees:
        if bool(nodes[0]["is_leaf"]):
            base += float(nodes[0]["value"])
            continue
        state["starts"].append(len(state["features"]))
        values: list[float] = []
        _walk(nodes, 0, values, state)
        state["values"] += values + [0.0] * (LEAVES - len(values))
    return Trees.restored({"base": base, **state})


def _walk(nodes: Any, place: int, values: list[float], state: dict[str, Any]) -> None:
    """Number the leaves below a node from the left and note every split with the leaves that failing it strikes out."""
    node = nodes[place]
    if node["is_leaf"]:
        values.append(float(node["value"]))
        return
    split = len(state["features"])
    state["features"].append(int(node["feature_idx"]))
    state["thresholds"].append(float(node["num_threshold"]))
    state["masks"].append(0)
    first = len(values)
    _walk(nodes, int(node["left"]), values, state)
    struck = (1 << len(values)) - (1 << first)
    state["masks"][split] = _ALL & ~struck
    _walk(nodes, int(node["right"]), values, state)
