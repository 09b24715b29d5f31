"""Sums over hospitals of which the server learns the total and nothing else."""
