"""The packing experiment's inner loop: several runs in lockstep, each placing its own sequence of Pods on its own cluster.

A run keeps the score of every (shape, node). A placement changes one node, so one column of scores: it is computed for all shapes
at once, and the columns of all runs together. Choosing a node is a search for the largest in one row. Nodes stand in the order in
which a tie takes the first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from engine.resources import WHOLE_GPU
from sim.packing_policies import Ints, Nodes, Policy, Shapes, drawn

Scores = npt.NDArray[np.int16]
Draws = npt.NDArray[np.float64]
NEVER = -1
"""The score where a shape does not fit."""
_STEPS_BETWEEN = 500


def run_in_lockstep(
    nodes: Nodes,
    shapes: Shapes,
    policy: Policy,
    order: Ints,
    sequence: Ints,
    draws: Draws | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Ints:
    """Return int64[run, step]: the node (its row in `nodes`) that took the Pod, or -1.

    Run r offers `sequence[r]` (shapes; -1: nothing) to the nodes in `order[r]`. With `draws`, [run, step, 2] in [0, 1), ties
    between nodes are drawn, and devices where the policy draws them.
    """
    runs, steps = sequence.shape
    if runs == 1:
        return _run_alone(nodes.take(order[0]), shapes, policy, order[0], sequence[0], draws, progress)[None, :]
    count = len(nodes)
    table = _first_scores(nodes, shapes, policy, order)
    state = nodes.take(order.reshape(-1))
    every, columns = np.arange(runs), np.arange(len(shapes))
    placed = np.full((steps, runs), -1, dtype=np.int64)
    offered = np.ascontiguousarray(sequence.T)
    for step in range(steps):
        if step % _STEPS_BETWEEN == 0:
            progress(step / steps)
        rows = offered[step]
        scores = table[every, rows]
        chosen = scores.argmax(axis=1)
        best = scores[every, chosen]
        if draws is not None:
            chosen = drawn(scores == best[:, None], draws[:, step, 0])
        fits = (best >= 0).nonzero()[0]
        if not len(fits):
            continue
        if len(fits) < runs:
            chosen, rows = chosen[fits], rows[fits]
        placed[step, fits] = chosen
        at = fits * count + chosen
        touched = state.take(at)
        place(policy, touched, shapes, rows, None if draws is None else draws[fits, step, 1])
        state.cpu[at] = touched.cpu
        state.memory[at] = touched.memory
        state.left[at] = touched.left
        state.tags[at] = touched.tags
        table[fits[:, None], columns, chosen[:, None]] = masked(policy, touched, shapes)
    found = placed.T
    return np.where(found >= 0, np.take_along_axis(order, np.maximum(found, 0), axis=1), -1)


def _run_alone(
    state: Nodes,
    shapes: Shapes,
    policy: Policy,
    order: Ints,
    sequence: Ints,
    draws: Draws | None,
    progress: Callable[[float], None],
) -> Ints:
    """Do what `run_in_lockstep` does for a single run, with views of one row instead of gathers."""
    table = np.ascontiguousarray(masked(policy, state, shapes).T.astype(np.int16))
    placed = np.full(len(sequence), -1, dtype=np.int64)
    kinds = np.arange(len(shapes))
    rows = [
        Nodes(
            state.cpu[at : at + 1],
            state.memory[at : at + 1],
            state.left[at : at + 1],
            state.gpus[at : at + 1],
            state.model[at : at + 1],
            state.tags[at : at + 1],
        )
        for at in range(len(state))
    ]
    for step, kind in enumerate(sequence.tolist()):
        if step % _STEPS_BETWEEN == 0:
            progress(step / len(sequence))
        if kind < 0:
            continue
        scores = table[kind]
        chosen = int(scores.argmax())
        best = scores.item(chosen)
        if best < 0:
            continue
        if draws is not None:
            chosen = int(drawn((scores == best)[None, :], draws[:, step, 0])[0])
        placed[step] = chosen
        node = rows[chosen]
        place(policy, node, shapes, kinds[kind : kind + 1], None if draws is None else draws[:, step, 1])
        table[:, chosen] = masked(policy, node, shapes)[0]
    return np.where(placed >= 0, order[placed], -1)


def _first_scores(nodes: Nodes, shapes: Shapes, policy: Policy, order: Ints) -> Scores:
    """Return int16[run, shape, place in the order]; the last shape is the one that never fits."""
    first = masked(policy, nodes, shapes).T
    table: Scores = np.full((len(order), len(shapes) + 1, len(nodes)), NEVER, dtype=np.int16)
    for run, rows in enumerate(order):
        table[run, :-1] = first[:, rows]
    return table


def masked(policy: Policy, nodes: Nodes, shapes: Shapes) -> Ints:
    """Return int64[node, shape]: the policy's scores, `NEVER` where a shape does not fit."""
    fits = nodes.cpu[:, None] >= shapes.cpu
    fits &= nodes.memory[:, None] >= shapes.memory
    fits &= shapes.access[nodes.model]
    left = np.sort(nodes.left, axis=1)
    fits &= left.take(shapes.slot, axis=1) >= shapes.share
    scores = policy.scores(nodes, shapes)
    np.copyto(scores, NEVER, where=~fits)
    return scores


def place(policy: Policy, nodes: Nodes, shapes: Shapes, rows: Ints, draw: Draws | None = None) -> None:
    """Take what the shape in `rows` asks for from each node: shared by the policy's device, whole devices in their order."""
    share = shapes.share[rows]
    left = nodes.left
    some = (rows < shapes.shared).nonzero()[0]
    if len(some) < len(rows):
        whole = left == WHOLE_GPU
        gpus = shapes.gpus[rows]
        gpus[some] = 0
        whole &= whole.cumsum(axis=1) <= gpus[:, None]
        left[whole] = 0
    if len(some) == len(rows):
        left[np.arange(len(rows)), policy.devices(nodes, shapes, rows, draw)] -= share
    elif len(some):
        of = nodes.take(some)
        left[some, policy.devices(of, shapes, rows[some], None if draw is None else draw[some])] -= share[some]
    nodes.cpu -= shapes.cpu[rows]
    nodes.memory -= shapes.memory[rows]
    nodes.tags |= shapes.tag[rows]
