"""When will it be done: a fast forward run of a copy of the live state, calibrated on what came of earlier promises.

Nothing here decides: the engine never reads it, so replays and snapshots know nothing of it. `foresight.Foresight` is the face.
"""
