"""The scheduler (SM): one deterministic, sans-IO engine that decides for every world that drives it."""
