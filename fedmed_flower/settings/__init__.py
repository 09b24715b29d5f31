"""Settings of runs and of hospitals, in groups."""
