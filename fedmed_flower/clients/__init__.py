"""Clients to subclass for a hospital's data; `fedmed_flower` has them all by name."""
