"""The arrays of a model: views without copies, sums over them, updates."""
