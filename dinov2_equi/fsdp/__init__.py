"""Checkpoints and the moving average of the teacher."""
