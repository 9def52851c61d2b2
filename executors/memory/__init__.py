"""Memory is planned before it is used: what a model needs by size and batch, what a device offers, and what follows from both."""
