"""Sums of vectors that are encrypted by CKKS, with TenSEAL, and what they cost.

The parameters are those that NVFlare sets: 8,192 coefficients, moduli of 60, 40 and 40 bits, a
scale of 2^40. Each 4,096 numbers are a ciphertext.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import numpy as np
from peers.costs import vectors_of


class Encrypted(NamedTuple):
    """Of CKKS: CPU seconds of each step, bytes over those of float32, and the largest error."""

    encrypt: float
    add: float
    decrypt: float
    up: float
    back: float
    error: float


def encrypted(size: int, sites: int) -> Encrypted:
    """Return what CKKS costs for vectors of one size.

    Each hospital encrypts and serialises its vector times its share of all rows; the server reads
    and adds each, and sends the sum, which a hospital reads and decrypts. All hold one secret key.
    """
    import tenseal

    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        poly_modulus_degree=8192,
        coeff_mod_bit_sizes=[60, 40, 40],
        n_threads=1,
    )
    context.global_scale = 2.0**40
    vectors = vectors_of(size, sites)
    encrypting = []
    adding = []
    total = None
    for vector in vectors:
        began = time.process_time()
        sent = tenseal.ckks_vector(context, vector / np.float32(sites)).serialize()
        encrypting.append(time.process_time() - began)
        began = time.process_time()
        read = tenseal.ckks_vector_from(context, sent)
        total = read if total is None else total + read
        adding.append(time.process_time() - began)
    began = time.process_time()
    back = total.serialize()
    adding.append(time.process_time() - began)
    began = time.process_time()
    mean = np.array(tenseal.ckks_vector_from(context, back).decrypt())
    decrypting = time.process_time() - began
    true = np.mean([vector / np.float32(sites) for vector in vectors], 0, dtype=float) * sites
    return Encrypted(
        encrypt=statistics.median(encrypting),
        add=sum(adding),
        decrypt=decrypting,
        up=len(sent) / (4 * size),
        back=len(back) / (4 * size),
        error=float(np.abs(mean - true).max()),
    )
