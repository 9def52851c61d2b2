"""The executor protocol's two ends as sans-IO state machines: the real world and the simulated one move their messages."""
