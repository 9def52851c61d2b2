"""The AI methods a Pod can run. They know nothing of the scheduler."""
