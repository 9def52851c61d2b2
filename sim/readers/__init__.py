"""Readers of other people's traces. `sim.readers.registry` knows them all; each file here knows one format."""
