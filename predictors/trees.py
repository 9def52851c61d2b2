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
_ALL = np.uint16(0xFFFF)
_ROWS_AT_ONCE = 512
_TOTAL_RATE = 4.8
"""Learning rate times trees: fewer trees take larger steps."""


def _first_bits() -> NDArray[np.int8]:
    masks = np.arange(1, 1 << LEAVES)
    return np.concatenate(([0], np.log2(masks & -masks))).astype(np.int8)


_FIRST_BIT = _first_bits()


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """An additive model. ``features``, ``thresholds`` and ``masks`` have one entry per split, ``starts`` one per tree."""

    base: float
    features: NDArray[np.int64]
    thresholds: NDArray[np.float64]
    masks: NDArray[np.uint16]
    """Leaves that remain when the row's feature exceeds the threshold."""
    starts: NDArray[np.int64]
    values: NDArray[np.float64]
    """Of the leaves, `LEAVES` places for each tree."""
    offsets: NDArray[np.int64]

    def predict(self, row: NDArray[np.float64]) -> float:
        """Return the model's value for one row of features."""
        if not len(self.starts):
            return self.base
        kept = np.where(row.take(self.features) <= self.thresholds, _ALL, self.masks)
        leaves = _FIRST_BIT.take(np.bitwise_and.reduceat(kept, self.starts))
        return self.base + float(np.add.reduce(self.values.take(self.offsets + leaves)))

    def predict_rows(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the model's values for rows of features, shape (rows, features)."""
        found = np.full(len(rows), self.base)
        if not len(self.starts):
            return found
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[begin : begin + _ROWS_AT_ONCE]
            kept = np.where(part[:, self.features] <= self.thresholds, _ALL, self.masks)
            leaves = _FIRST_BIT[np.bitwise_and.reduceat(kept, self.starts, axis=1)]
            found[begin : begin + len(part)] += self.values[self.offsets + leaves].sum(axis=1)
        return found

    def state(self) -> dict[str, Any]:
        """Return the model as plain values."""
        return {
            "base": self.base,
            "features": self.features.tolist(),
            "thresholds": self.thresholds.tolist(),
            "masks": self.masks.tolist(),
            "starts": self.starts.tolist(),
            "values": self.values.tolist(),
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Trees:
        """Return the model that `state` described."""
        return cls(
            base=state["base"],
            features=np.array(state["features"], dtype=np.int64),
            thresholds=np.array(state["thresholds"], dtype=np.float64),
            masks=np.array(state["masks"], dtype=np.uint16),
            starts=np.array(state["starts"], dtype=np.int64),
            values=np.array(state["values"], dtype=np.float64),
            offsets=np.arange(len(state["starts"]), dtype=np.int64) * LEAVES,
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
    state["masks"][split] = int(_ALL) & ~struck
    _walk(nodes, int(node["right"]), values, state)
