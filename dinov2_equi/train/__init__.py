"""The training step, its schedules and its parameter groups."""
