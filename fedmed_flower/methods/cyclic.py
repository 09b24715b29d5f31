"""Cyclic weight transfer: the model goes from one hospital to the next.

Chang, Balachandar, Lam, Yi, Brown, Beers, Rosen, Rubin, Kalpathy-Cramer: Distributed deep learning
networks among institutions for medical imaging, Journal of the American Medical Informatics
Association 2018, https://doi.org/10.1093/jamia/ocy017.

When to take it: few hospitals that cannot be online at the same time. A round is one hospital's;
the last one has the most influence.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmed_flower.methods.base import Method


class Cyclic(Method):
    """In round r the r-th site trains, in the order of the sites' names, again and again."""

    name = "cyclic"
    private = True
    needs_all = True

    def choose(self, nodes: Sequence[int], server_round: int) -> Sequence[int]:
        """Return the one node whose turn it is."""
        return [nodes[(server_round - 1) % len(nodes)]]
