"""Step-level batching of generation: many requests, each at a denoising step of its own, in one call of the network.

The core does no input or output, starts no thread and asks no clock: whoever owns the device calls `RunningBatch.step` in a loop.
"""
