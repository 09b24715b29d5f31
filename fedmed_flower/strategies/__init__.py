"""Strategies to import into a Flower ServerApp in place of Flower's own."""

from fedmed_flower.strategies.base import FedAvg

__all__ = ["FedAvg"]
