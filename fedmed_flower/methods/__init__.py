"""Methods for hospitals that differ: what they do beside plain training, one file each."""

from fedmed_flower.methods.base import Ended, Method, Moved, ServerRound, SiteRound
from fedmed_flower.methods.registry import register

__all__ = ["Ended", "Method", "Moved", "ServerRound", "SiteRound", "register"]
