"""The formulas of secure sums once more, slow and plain, and the vectors of known answers.

Nothing here comes from the package. Of libraries only HMAC, SHA and AES of a single block are used:
the curve, HKDF, the counter mode, GCM, the field of the shares and the canonical bytes are written
out below. ``python tests/helpers/secure_reference.py`` writes `VECTORS` anew; a test sees to it
that the file and the package agree with this script.
"""

import hashlib
import hmac
import json
import struct
import unicodedata
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

VECTORS = Path(__file__).parents[1] / "secure_vectors.json"
LABEL = "fedmed-secure/1"


def vectors():
    """Return all known answers, as values that JSON can hold; bytes are in hexadecimal digits."""
    return {
        "encoding": _encodings(),
        "arrays": _arrays(),
        "keys": _keys(),
        "streams": _streams(),
        "shamir": _shamir(),
        "envelopes": _envelopes(),
        "rounds": [_round(3, 0), _round(5, 1)],
    }


# Canonical bytes. A value is written as a list of its type and content, the same in any language.


def encoded(value):
    """Return the canonical bytes of a typed value, such as ``["list", [["int", "5"]]]``."""
    kind, content = value
    if kind == "none":
        return _piece("n", b"")
    if kind == "bool":
        return _piece("t" if content else "f", b"")
    if kind == "int":
        return _piece("i", content.encode("ascii"))
    if kind == "float":
        number = float.fromhex(content)
        return _piece("d", struct.pack(">d", 0.0 if number == 0 else number))
    if kind == "text":
        return _piece("s", unicodedata.normalize("NFC", content).encode("utf-8"))
    if kind == "bytes":
        return _piece("b", bytes.fromhex(content))
    if kind == "list":
        return _piece("l", b"".join(encoded(item) for item in content))
    pairs = [(encoded(["text", key]), encoded(item)) for key, item in content]
    # Shorter keys first, since the length stands in front.
    return _piece("m", b"".join(key + item for key, item in sorted(pairs)))


def _piece(letter, content):
    return letter.encode("ascii") + len(content).to_bytes(8, "big") + content


def sha512_256(content):
    return hashlib.new("sha512_256", content).digest()


def _texts(*texts):
    return ["list", [["text", text] for text in texts]]


# Keys: X25519 (RFC 7748, section 5) and HKDF (RFC 5869, section 2).

_PRIME = 2**255 - 19
_BASE = (9).to_bytes(32, "little")


def x25519(private, public=_BASE):
    """Multiply a point by a scalar, by the ladder of RFC 7748."""
    scalar = int.from_bytes(private, "little")
    scalar &= ~7 & (2**255 - 1)
    scalar |= 2**254
    u = int.from_bytes(public, "little") % 2**255 % _PRIME
    low = (1, 0)
    high = (u, 1)
    for bit in range(254, -1, -1):
        # The difference of the two points stays the given one.
        both = _added(low, high, u)
        if scalar >> bit & 1:
            low, high = both, _doubled(high)
        else:
            low, high = _doubled(low), both
    x, z = low
    return (x * pow(z, _PRIME - 2, _PRIME) % _PRIME).to_bytes(32, "little")


def _added(one, other, difference):
    across = (one[0] - one[1]) * (other[0] + other[1])
    along = (one[0] + one[1]) * (other[0] - other[1])
    x = pow(across + along, 2, _PRIME)
    z = difference * pow(across - along, 2, _PRIME) % _PRIME
    return x, z


def _doubled(point):
    total = pow(point[0] + point[1], 2, _PRIME)
    difference = pow(point[0] - point[1], 2, _PRIME)
    rest = total - difference
    return total * difference % _PRIME, rest * (total + 121665 * rest) % _PRIME


def agreed_key(private, public, salt, secret=b""):
    return hmac.digest(salt + secret, x25519(private, public), "sha256")


def expanded(key, use, sender, receiver, index, length):
    about = ["list", [*_texts(LABEL, use, sender, receiver)[1], ["int", str(index)]]]
    block = b""
    made = b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + encoded(about) + bytes([number]), "sha256")
        made += block
    return made[:length]


def pair_seed(prk, one, other):
    return expanded(prk, "pair", min(one, other), max(one, other), 0, 16)


def envelope_key(prk, sender, receiver):
    return expanded(prk, "envelope", sender, receiver, 0, 16)


def stream_key(seed, index):
    return expanded(seed, "stream", "", "", index, 16)


def commitment(seed, use, sender, receiver):
    names = (min(sender, receiver), max(sender, receiver))
    content = [*_texts(LABEL, "commitment", use, *names)[1], ["bytes", seed.hex()]]
    return sha512_256(encoded(["list", content]))


# Streams.


def keystream(key, length, first=0):
    """Return the AES-CTR keystream from a counter on, block by block."""
    cipher = Cipher(AES(key), ECB()).encryptor()
    blocks = range(first, first + -(-length // 16))
    return b"".join(cipher.update(block.to_bytes(16, "big")) for block in blocks)[:length]


def with_stream(words, bits, seed, index, sign=1):
    """Return words (whole numbers below 2^bits) with a stream added, or subtracted."""
    size = bits // 8
    stream = keystream(stream_key(seed, index), size * len(words))
    added = (stream[place : place + size] for place in range(0, len(stream), size))
    return [
        (word + sign * int.from_bytes(piece, "little")) % 2**bits
        for word, piece in zip(words, added, strict=True)
    ]


def words_as_bytes(words, bits):
    return b"".join(word.to_bytes(bits // 8, "little") for word in words)


# Shares.


def product(a, b):
    """Multiply in the field of 256 elements, bit by bit, modulo x^8 + x^4 + x^3 + x + 1."""
    result = 0
    while b:
        if b & 1:
            result ^= a
        a <<= 1
        if a & 0x100:
            a ^= 0x11B
        b >>= 1
    return result


def quotient(a, b):
    return next(c for c in range(256) if product(b, c) == a)


def value_at(coefficients, x):
    """Return the value of a polynomial, the sum of its terms."""
    value = 0
    power = 1
    for coefficient in coefficients:
        value ^= product(coefficient, power)
        power = product(power, x)
    return value


def shares_of(polynomials, count):
    """Return a share (one byte a polynomial) for each of the coordinates 1, 2, ..., count."""
    return [bytes(value_at(one, x) for one in polynomials) for x in range(1, count + 1)]


def secret_of(shares):
    """Return the secret of shares by coordinate, by Lagrange's formula at 0."""
    secret = bytes(len(next(iter(shares.values()))))
    for x, share in shares.items():
        weight = 1
        for other in shares:
            if other != x:
                weight = product(weight, quotient(other, other ^ x))
        secret = bytes(a ^ product(weight, b) for a, b in zip(secret, share, strict=True))
    return secret


# Envelopes: AES-GCM (NIST SP 800-38D).


def sealed(key, nonce, header, content):
    """Return nonce, ciphertext and tag."""
    first = int.from_bytes(nonce + b"\0\0\0\1", "big")
    stream = keystream(key, len(content), first + 1)
    hidden = bytes(a ^ b for a, b in zip(content, stream, strict=True))
    lengths = (8 * len(header)).to_bytes(8, "big") + (8 * len(hidden)).to_bytes(8, "big")
    hashed = _ghash(keystream(key, 16), _padded(header) + _padded(hidden) + lengths)
    tag = bytes(a ^ b for a, b in zip(hashed, keystream(key, 16, first), strict=True))
    return nonce + hidden + tag


def _padded(content):
    return content + bytes(-len(content) % 16)


def _ghash(key, content):
    factor = int.from_bytes(key, "big")
    value = 0
    for start in range(0, len(content), 16):
        value ^= int.from_bytes(content[start : start + 16], "big")
        value = _gcm_product(value, factor)
    return value.to_bytes(16, "big")


def _gcm_product(a, b):
    """Multiply in the field of GCM, whose highest bit is the constant term."""
    result = 0
    for bit in range(127, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (0xE1 << 120 if b & 1 else 0)
    return result


# What is known.


def _encodings():
    values = [
        ["none", None],
        ["bool", True],
        ["bool", False],
        ["int", "0"],
        ["int", "-17"],
        ["int", str(2**70)],
        ["float", (0.1).hex()],
        ["float", (-0.0).hex()],
        ["float", "inf"],
        ["text", ""],
        ["text", "Besan\u00e7on"],
        ["text", "Besanc\u0327on"],
        ["bytes", "00ff"],
        ["list", []],
        ["map", []],
        [
            "list",
            [["int", "1"], ["float", (1.0).hex()], ["bool", True], ["list", [["none", None]]]],
        ],
        [
            "map",
            [["b", ["int", "1"]], ["aa", ["int", "2"]], ["\u00e9", ["map", [["", _texts("")]]]]],
        ],
    ]
    return [
        {"value": value, "bytes": encoded(value).hex(), "digest": sha512_256(encoded(value)).hex()}
        for value in values
    ]


def _arrays():
    weight = ("weight", "<f4", [2, 3], struct.pack("<6f", 0, 0.5, -1, 2, 4, -0.25))
    bias = ("bias", "<f8", [2], struct.pack("<2d", 1 / 3, -2))
    empty = ("empty", "<f4", [0, 4], b"")
    scalar = ("steps", "<i8", [], struct.pack("<q", 7))
    return [_digest_of_arrays(weight, bias, empty), _digest_of_arrays(scalar)]


def _digest_of_arrays(*arrays):
    content = []
    for name, dtype, shape, data in arrays:
        sizes = ["list", [["int", str(size)] for size in shape]]
        inside = ["bytes", hashlib.sha256(data).hexdigest()]
        content.append([name, ["list", [["text", dtype], sizes, inside]]])
    return {
        "arrays": [
            {"name": name, "dtype": dtype, "shape": shape, "bytes": data.hex()}
            for name, dtype, shape, data in arrays
        ],
        "digest": sha512_256(encoded(["map", content])).hex(),
    }


def _keys():
    known = []
    for number, secret in enumerate((b"", b"agreed by telephone")):
        names = ("south", "north")
        privates = [sha512_256(f"{name} {number}".encode()) for name in names]
        publics = [x25519(private) for private in privates]
        salt = sha512_256(f"round {number}".encode())
        prk = agreed_key(privates[0], publics[1], salt, secret)
        seed = pair_seed(prk, *names)
        known.append(
            {
                "names": list(names),
                "private": [private.hex() for private in privates],
                "public": [public.hex() for public in publics],
                "salt": salt.hex(),
                "secret": secret.hex(),
                "prk": prk.hex(),
                "pair_seed": seed.hex(),
                "envelope_key": [
                    envelope_key(prk, *names).hex(),
                    envelope_key(prk, *reversed(names)).hex(),
                ],
                "expanded": expanded(prk, "other use", *names, 12, 80).hex(),
                "stream_key": [stream_key(seed, index).hex() for index in (0, 1)],
                "commitment": commitment(seed, "pair", *names).hex(),
            }
        )
    return known


def _streams():
    known = []
    # The long ones are known by their digest, and go over several blocks of any implementation.
    for bits, index, length in ((32, 0, 11), (64, 1, 6), (32, 0, 300_001), (64, 1, 150_001)):
        seed = sha512_256(f"stream {bits} {length}".encode())[:16]
        vector = [2**bits - 1 - place * place for place in range(length)]
        masked = words_as_bytes(with_stream(vector, bits, seed, index), bits)
        less = words_as_bytes(with_stream(vector, bits, seed, index, sign=-1), bits)
        known.append(
            {
                "bits": bits,
                "seed": seed.hex(),
                "index": index,
                "length": length,
                "first": masked[:48].hex(),
                "digest": sha512_256(masked).hex(),
                "digest_subtracted": sha512_256(less).hex(),
            }
        )
    return known


def _shamir():
    known = []
    for threshold, count in ((2, 3), (3, 5), (11, 20)):
        drawn = b"".join(sha512_256(f"{threshold} {place}".encode()) for place in range(threshold))
        # One polynomial for each of 16 bytes.
        polynomials = [drawn[place::16][:threshold] for place in range(16)]
        shares = shares_of(polynomials, count)
        last = {x: shares[x - 1] for x in range(count - threshold + 1, count + 1)}
        known.append(
            {
                "threshold": threshold,
                "coefficients": [
                    bytes(one[power] for one in polynomials).hex() for power in range(threshold)
                ],
                "shares": [share.hex() for share in shares],
                "secret": secret_of(last).hex(),
            }
        )
    return known


def _envelopes():
    known = []
    for content in (b"", b"shares of two seeds", bytes(range(96))):
        prk = sha512_256(content)
        header = encoded(["list", [["bytes", prk.hex()], *_texts("north", "south")[1]]])
        key = envelope_key(prk, "north", "south")
        nonce = sha512_256(b"nonce" + content)[:12]
        known.append(
            {
                "key": key.hex(),
                "header": header.hex(),
                "content": content.hex(),
                "sealed": sealed(key, nonce, header, content).hex(),
            }
        )
    return known


def _round(count, lost):
    """A whole round, of whose hospitals the last ones are lost before their vectors come."""
    names = [f"hospital-{number + 1}" for number in range(count)]
    drawn = {name: sha512_256(f"round {count} {name}".encode()) for name in names}
    digest = sha512_256(f"round {count}".encode())
    threshold = (count + (count > 3)) // 2 + 1
    publics = {name: x25519(drawn[name]) for name in names}
    pairs = {
        (one, other): pair_seed(agreed_key(drawn[one], publics[other], digest), one, other)
        for one in names
        for other in names
        if one != other
    }
    own = {name: sha512_256(f"own {count} {name}".encode())[:16] for name in names}
    vectors = {
        name: {
            bits: [(number * 2**bits) // 7 + 11 * place for place in range(4)] for bits in (32, 64)
        }
        for number, name in enumerate(names)
    }
    remaining = names[: count - lost]
    masked = {name: {} for name in remaining}
    for name in remaining:
        for index, bits in enumerate((32, 64)):
            words = with_stream(vectors[name][bits], bits, own[name], index)
            for other in names:
                if other != name:
                    sign = 1 if other > name else -1
                    words = with_stream(words, bits, pairs[name, other], index, sign)
            masked[name][bits] = words
    shares = {}
    for name in remaining:
        drawn_here = b"".join(
            sha512_256(f"{count} {name} {place}".encode()) for place in range(threshold)
        )
        # The first coefficient is the secret.
        polynomials = [
            own[name][place : place + 1] + drawn_here[place::16][: threshold - 1]
            for place in range(16)
        ]
        shares[name] = [share.hex() for share in shares_of(polynomials, count)]
    return {
        "names": names,
        "remaining": remaining,
        "digest": digest.hex(),
        "threshold": threshold,
        "run_keys": {name: drawn[name].hex() for name in names},
        "own_seeds": {name: own[name].hex() for name in names},
        "shares_of_own_seeds": shares,
        "vectors": {name: _in_hex(vectors[name]) for name in remaining},
        "masked": {name: _in_hex(masked[name]) for name in remaining},
        "sum": _in_hex(
            {
                bits: [
                    sum(row) % 2**bits
                    for row in zip(*(vectors[name][bits] for name in remaining), strict=True)
                ]
                for bits in (32, 64)
            }
        ),
    }


def _in_hex(words):
    return {str(bits): words_as_bytes(words[bits], bits).hex() for bits in words}


def text():
    return json.dumps(vectors(), indent=1, ensure_ascii=True) + "\n"


if __name__ == "__main__":
    VECTORS.write_text(text())
