"""The simulated world: a SimPy cluster behind the engine's World port, workloads, faults and reports."""
