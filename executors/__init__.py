"""The real world: node agents behind ZeroMQ, devices, Pods, the file store and the AI methods they run."""
