"""The error of a run that goes round in circles; apart, because a native module can define no exception."""


class EngineStuck(RuntimeError):
    """The engine asks again and again to be woken at once and does nothing with it: a fault of a policy."""
