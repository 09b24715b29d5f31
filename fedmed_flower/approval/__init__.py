"""Which app bundles a hospital runs, and with which settings: its own list, and who reads it."""
