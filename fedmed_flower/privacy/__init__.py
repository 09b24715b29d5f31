"""Differential privacy: noise and its accounting."""
