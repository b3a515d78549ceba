"""Processes, the device mesh, and how the model is laid over it."""
