"""The mathematics: pure functions on tensors, one file per method. Imports torch and nothing else."""
