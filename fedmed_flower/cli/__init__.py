"""The command ``fedmed``."""
