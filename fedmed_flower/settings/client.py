"""How a site trains, on tables too, and what is around it: settings, seeds, device, threads."""

from __future__ import annotations
