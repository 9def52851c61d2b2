"""The scheduler process (SM): the engine in its world, on a durable journal."""
