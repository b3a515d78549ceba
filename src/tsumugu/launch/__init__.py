"""Ways to start training: processes on this machine."""
