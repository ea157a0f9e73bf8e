"""The parts around a model: loop, checkpoints, processes, logs, counts and pictures."""
