"""Training: the loop, the objectives, the schedule, checkpoints, and one run from end to end."""
