"""Settings of runs and of hospitals, one file per group."""
