"""Numbers as whole numbers modulo 2^32 or 2^64, so that sums of masked vectors are exact.

A `Layout` names the parts of a vector in order. Each hospital encodes its values, the words are
added modulo 2^32 and 2^64, and the layout decodes the sum. Addition in the ring has no rounding, so
the sum does not depend on the order of the hospitals.

Weights of a model are fixed-point numbers in 32 bits. Their scale is the largest power of two that
leaves the sum below 2^31. Each hospital rounds up or down by chance so that the mean error is 0,
and the errors of many hospitals cancel (Gupta et al., Deep Learning with Limited Numerical
Precision, ICML 2015, https://arxiv.org/abs/1502.02551, section 3).
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.secure.encoding import SecureError

FIXED = "fixed"
COUNT = "count"
REAL = "real"
KINDS = (FIXED, COUNT, REAL)
# Of how many hospitals one sum may be.
MOST_SITES = 256

# A count is below this, so that the sum of all hospitals stays below 2^64.
_COUNTS = 1 << 56
_LARGEST_SUM = (1 << 63) - 1
# A real value in units of its bound is upper / 2^50 + lower / 2^102. A sum of 256 leaves 5 bits.
_UPPER = 50
_LOWER = 52
_LEAST_EXPONENT = -40
_LARGEST_EXPONENT = 40
_MOST_PARTS = 100_000
_MOST_VALUES = 1 << 31
_LONGEST_NAME = 1_000
# Values at a time: their buffers stay in the cache of one core.
_BLOCK = 1 << 15
# Random bits for the rounding of one value.
_BITS = 16
# A double in [2^36, 2^37) counts steps of 2^-16. Adding this one to a value below 2^35 in absolute
# value leaves the value, rounded to 2^-16, in the low bits of the sum.
_SHIFT = 1.5 * 2.0**36
_LARGEST_NOISE = 2.0**34

Vector = NDArray[np.uint32] | NDArray[np.uint64]
Words = tuple[NDArray[np.uint32], NDArray[np.uint64]]


def vectors(words: Words) -> list[Vector]:
    """Return the two vectors, that of uint32 first."""
    return [words[0], words[1]]


class Encoded(NamedTuple):
    """A hospital's values in the ring.

    Attributes
    ----------
    words : tuple of ndarray
        One vector of uint32 and one of uint64.
    clipped : int
        How many values were not finite or beyond the bound of their part.
    """

    words: Words
    clipped: int


@dataclass(frozen=True)
class Part:
    """One entry of what is summed.

    Parameters
    ----------
    name : str
        At most 1,000 letters.
    size : int
        Number of values, at least 0.
    kind : str
        "fixed": a number in 32 bits, such as the change of a weight. "count": a whole number from 0
        to below 2^56. "real": a number in two words of 64 bits.
    bound : float
        Largest absolute value of a fixed or real number: a power of two from 2^-40 to 2^40.
        It is 0 for counts. The sum of fixed numbers must be within the bound too; it is, if the
        weights of all hospitals add up to 1.
    sigma : float
        Standard deviation of the noise that all hospitals together add to a fixed number, from 0 to
        2^40. The ring leaves room for 8 times this.

    Raises
    ------
    InputError
        If a value is not one of these.
    """

    name: str
    size: int
    kind: str
    bound: float = 0.0
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if len(self.name) > _LONGEST_NAME:
            raise InputError(
                f"the name of a part has at most {_LONGEST_NAME} letters, got {len(self.name)}"
            )
        if not 0 <= self.size <= _MOST_VALUES:
            raise InputError(
                f"the size of part {self.name!r} must be from 0 to 2^31, got {self.size}"
            )
        if self.kind not in KINDS:
            raise InputError(
                f"the kind of part {self.name!r} must be one of {', '.join(KINDS)}, "
                f"got {self.kind!r}"
            )
        if self.kind == COUNT:
            if self.bound != 0:
                raise InputError(f"a count has no bound, part {self.name!r} has {self.bound}")
        elif not _is_bound(self.bound):
            raise InputError(
                f"the bound of part {self.name!r} must be a power of two from 2^-40 to 2^40, "
                f"got {self.bound}"
            )
        most = 2.0**_LARGEST_EXPONENT if self.kind == FIXED else 0.0
        if not 0 <= self.sigma <= most:
            raise InputError(
                f"sigma of part {self.name!r}, which is {self.kind}, must be from 0 to {most:g}, "
                f"got {self.sigma}"
            )

    @property
    def scale(self) -> float:
        """Steps of the ring in 1: for a fixed number, a power of two.

        The largest one for which (bound + 8 sigma) * scale, and one step of rounding of each of 256
        hospitals, is below 2^31.
        """
        room = (2.0**31 - MOST_SITES) / (self.bound + 8 * self.sigma)
        mantissa, exponent = math.frexp(room)
        # Strictly below, so a room that is a power of two takes the next smaller one.
        return 2.0 ** (exponent - 2 if mantissa == 0.5 else exponent - 1)

    @property
    def words(self) -> int:
        """How many words the part takes in its vector."""
        return 2 * self.size if self.kind == REAL else self.size


def _is_bound(value: float) -> bool:
    if not 2.0**_LEAST_EXPONENT <= value <= 2.0**_LARGEST_EXPONENT:
        return False
    return math.frexp(value)[0] == 0.5


@dataclass(frozen=True)
class Layout:
    """The parts of the two vectors that a hospital sends, in their order.

    Parameters
    ----------
    parts : tuple of Part
        At most 100,000 of different names, of at most 2^31 values together.

    Raises
    ------
    InputError
        If there are more, or two have one name.

    Examples
    --------
    >>> import numpy as np
    >>> layout = Layout((Part("weight", 2, FIXED, bound=0.5), Part("rows", 1, COUNT)))
    >>> values = {"weight": np.array([0.25, -0.125]), "rows": np.array([40])}
    >>> small, large = layout.encode(values, weight=0.5).words
    >>> sums = layout.decode((small + small, large + large), sites=2)
    >>> sums["weight"].tolist(), sums["rows"].tolist()
    ([0.25, -0.125], [80])
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if len(self.parts) > _MOST_PARTS:
            raise InputError(f"a layout has at most {_MOST_PARTS} parts, got {len(self.parts)}")
        seen: set[str] = set()
        for part in self.parts:
            # The digest of a layout holds names in this form.
            name = unicodedata.normalize("NFC", part.name)
            if name in seen:
                raise InputError(f"two parts of a layout have the name {part.name!r}")
            seen.add(name)
        total = sum(part.size for part in self.parts)
        if total > _MOST_VALUES:
            raise InputError(f"the parts of a layout have at most 2^31 values, got {total}")

    def content(self) -> list[list[str | int | float]]:
        """Return the parts as lists of plain values, for the digest."""
        return [
            [part.name, int(part.size), part.kind, float(part.bound), float(part.sigma)]
            for part in self.parts
        ]

    @classmethod
    def of_content(cls, content: Any) -> Layout:
        """Return the layout of a `content`, which may come from a stranger.

        Raises
        ------
        SecureError
            If `content` of no layout gives it.
        """
        if not isinstance(content, list | tuple):
            raise SecureError(f"a layout must be a list of parts, got {type(content).__name__}")
        # Before anything is made of them.
        if len(content) > _MOST_PARTS:
            raise SecureError(f"a layout has at most {_MOST_PARTS} parts, got {len(content)}")
        try:
            return cls(tuple(_part_of(entry) for entry in content))
        # Python writes no whole number of more than 4,300 digits into a text: a ValueError too.
        except ValueError as error:
            raise SecureError(error) from None

    @property
    def sizes(self) -> tuple[int, int]:
        """Words of the vector of uint32, and of that of uint64."""
        small = sum(part.words for part in self.parts if part.kind == FIXED)
        large = sum(part.words for part in self.parts if part.kind != FIXED)
        return small, large

    def part(self, name: str) -> Part:
        """Return the part of a name; StopIteration if there is none."""
        return next(part for part in self.parts if part.name == name)

    def encode(
        self,
        values: Mapping[str, NDArray[Any] | ArrayChange],
        weight: float = 1.0,
        random: Callable[[int], bytes] = os.urandom,
        noise: Mapping[str, NDArray[np.float64]] | None = None,
        weighted: Collection[str] = (),
    ) -> Encoded:
        """Return a hospital's values in the ring.

        A fixed number is clipped to the bound, multiplied by `weight` and by the scale in float64,
        reduced modulo 2^32 if the weight is above 1, and rounded up or down, with 16 random bits a
        value. The number first becomes the nearest multiple of 2^-16 of a step; of that the
        rounding is unbiased, so the mean of many roundings is within 2^-17 of a step of the number.
        The random bits are an AES-128 stream under a new key. Noise is added after the weight and
        before the one rounding, and is never clipped.

        A real number is exact to 2^-103 of its bound. Counts have no weight, and real numbers only
        those of parts in `weighted`, after they were clipped too.

        Weights of all hospitals add up to 1, unless who sets them is hostile. A weight above 1 is
        no error: an error, or a value that is cut, would tell something of this hospital alone. The
        words of the sum then follow from the weighted sum alone, modulo 2^32 or 2^64.

        A fixed or real number that is NaN or infinite counts as 0.

        Parameters
        ----------
        values : mapping of str to ndarray or ArrayChange
            By the name of the part, in any shape of the part's size. Fixed numbers in float32 or
            float64, real numbers also in whole numbers; counts in whole numbers or in floats
            without a fraction.
        weight : float
            At least 0, such as the hospital's share of all rows.
        random : callable
            Gives the 16 bytes of the key. Anything but `os.urandom` makes the rounding predictable.
        weighted : collection of str
            The real parts that have a weight.
        noise : mapping of str to ndarray, optional
            This hospital's share of the noise, for all fixed parts with a `sigma` or for some.

        Raises
        ------
        InputError
            If a part is missing, unknown or of another size or type; if a count is negative,
            fractional or 2^56 or more; if the weight is negative or not finite; if noise is for a
            part without `sigma`, not finite or beyond all room.
        """
        if not 0 <= weight < math.inf:
            raise InputError(f"weight must be at least 0 and finite, got {weight}")
        # All of it before memory is taken for words: a stranger may have written the layout.
        arrays = self._arrays(values)
        noises = self._noises(noise or {})
        small_size, large_size = self.sizes
        small = np.empty(small_size, np.uint32)
        large = np.empty(large_size, np.uint64)
        rounder = _Rounder(random(16))
        clipped = 0
        for part, place in self._places():
            array = arrays[part.name]
            if part.kind == FIXED:
                added = noises.get(part.name)
                clipped += rounder.encode(array, part, weight, added, small[place])
            elif part.kind == REAL:
                factor = weight if part.name in weighted else 1.0
                clipped += _encode_real(array[:], part, factor, large[place])
            else:
                large[place] = _counts(array[:], part)
        return Encoded((small, large), clipped)

    def decode(self, words: Words, sites: int) -> dict[str, NDArray[Any]]:
        """Return the sums of `sites` hospitals.

        Parameters
        ----------
        words : tuple of ndarray
            The sum of the hospitals' words, modulo 2^32 and 2^64.
        sites : int
            From 1 to 256.

        Returns
        -------
        dict of str to ndarray
            Flat arrays by the name of the part: float64 for fixed and real numbers, int64 for
            counts. A real sum is within one unit in the last place of float64.

        Raises
        ------
        InputError
            If `sites` is out of range.
        SecureError
            If the words have another number or type, or a real sum or a count is one that `sites`
            hospitals cannot have. Whether fixed numbers are within bounds, `excess` tells.
        """
        if not 1 <= sites <= MOST_SITES:
            raise InputError(f"a sum is of 1 to {MOST_SITES} hospitals, got {sites}")
        small, large = words
        small_size, large_size = self.sizes
        _check_words(small, np.dtype(np.uint32), small_size)
        _check_words(large, np.dtype(np.uint64), large_size)
        sums: dict[str, NDArray[Any]] = {}
        for part, place in self._places():
            if part.kind == FIXED:
                sums[part.name] = _decode_fixed(small[place], part)
            elif part.kind == REAL:
                sums[part.name] = _decode_real(large[place], part, sites)
            else:
                sums[part.name] = _decode_counts(large[place], part, sites)
        return sums

    def excess(self, sums: Mapping[str, NDArray[Any]], sites: int) -> str | None:
        """Return the name of the first part whose sum of fixed numbers is beyond its bound.

        Honest hospitals whose weights add up to 1 stay within the bound, one step of rounding each,
        and 8 times `sigma`. NaN is beyond every bound.

        Parameters
        ----------
        sums : mapping of str to ndarray
            What `decode` returned.
        sites : int
            Number of hospitals.

        Returns
        -------
        str or None
            None if all parts are within their bounds.
        """
        for part in self.parts:
            if part.kind != FIXED or not part.size:
                continue
            limit = part.bound * (1 + 1e-6) + 8 * part.sigma + sites / part.scale
            total = _values_of(sums, part)[:]
            if not (total.min() >= -limit and total.max() <= limit):
                return part.name
        return None

    def start(self, name: str) -> int:
        """Return where the words of a part begin in the vector of its kind.

        Raises
        ------
        InputError
            If there is no such part.
        """
        for part, place in self._places():
            if part.name == name:
                return place.start
        raise InputError(f"the layout has no part {name!r}")

    def _arrays(
        self, values: Mapping[str, NDArray[Any] | ArrayChange]
    ) -> dict[str, NDArray[Any] | ArrayChange]:
        """Return the values of each part as a flat array, and refuse those of no part."""
        self._require_known(values)
        return {part.name: _values_of(values, part) for part in self.parts}

    def _noises(self, noise: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        self._require_known(noise)
        noises = {}
        for part in self.parts:
            if part.name not in noise:
                continue
            if part.kind != FIXED or not part.sigma:
                raise InputError(f"there is noise for part {part.name!r}, which has no sigma")
            noises[part.name] = _values_of(noise, part)[:]
        return noises

    def _require_known(self, values: Mapping[str, NDArray[Any] | ArrayChange]) -> None:
        unknown = set(values) - {part.name for part in self.parts}
        if unknown:
            raise InputError(f"the layout has no part {min(unknown)!r}")

    def _places(self) -> Iterator[tuple[Part, slice[int, int, None]]]:
        """Yield each part with its place in the vector of its kind."""
        small = 0
        large = 0
        for part in self.parts:
            if part.kind == FIXED:
                yield part, slice(small, small + part.words)
                small += part.words
            else:
                yield part, slice(large, large + part.words)
                large += part.words


def _part_of(entry: Any) -> Part:
    if not isinstance(entry, list | tuple) or len(entry) != 5:
        raise SecureError("a part of a layout must be a list of five values")
    types = [type(value) for value in entry]
    if types != [str, int, str, float, float]:
        names = ", ".join(each.__name__ for each in types)
        raise SecureError(
            f"a part of a layout must be of the types str, int, str, float, float, got {names}"
        )
    return Part(*entry)


def _values_of(
    values: Mapping[str, NDArray[Any] | ArrayChange], part: Part
) -> NDArray[Any] | ArrayChange:
    """Return a part's values, flat, of the right size and type."""
    if part.name not in values:
        raise InputError(f"there are no values of part {part.name!r}")
    given = values[part.name]
    array = given if isinstance(given, ArrayChange) else np.asarray(given)
    if array.size != part.size:
        raise InputError(f"part {part.name!r} has {part.size} values, got {array.size}")
    if isinstance(array, ArrayChange):
        return array
    if part.kind == REAL and array.dtype.kind in "iu":
        array = array.astype(np.float64)
    if part.kind != COUNT and array.dtype not in (np.float32, np.float64):
        raise InputError(f"part {part.name!r} must be float32 or float64, got {array.dtype}")
    return array.reshape(-1)


def _within(values: NDArray[Any], bound: float) -> tuple[NDArray[Any], int]:
    """Return the values clipped to the bound, and how many had to be."""
    # Usually all are within it, and two passes without a copy tell. NaN fails both comparisons.
    if not values.size or (values.min() >= -bound and values.max() <= bound):
        return values, 0
    # Some bits of NaN warn when they are widened.
    with np.errstate(invalid="ignore"):
        wide = values.astype(np.float64)
    outside = ~(np.abs(wide) <= bound)
    clipped = np.where(np.isfinite(wide), np.clip(wide, -bound, bound), 0.0)
    return clipped, int(np.count_nonzero(outside))


def _steps(noise: NDArray[Any], part: Part) -> NDArray[np.float64]:
    """Return noise in steps of the ring."""
    steps: NDArray[np.float64] = np.multiply(noise, part.scale, dtype=np.float64)
    # Eight times what a sum may be. NaN fails both comparisons.
    if not (steps.min() >= -_LARGEST_NOISE and steps.max() <= _LARGEST_NOISE):
        raise InputError(f"the noise of part {part.name!r} is not finite or far beyond its sigma")
    return steps


class ArrayChange:
    """How much an array changes, as `Layout.encode` takes it: formed in float64, a block at a time.

    Formed at once it would be memory of eight bytes a weight that is used a single time.

    Parameters
    ----------
    after, before : ndarray
        Of one size and any shape.

    Raises
    ------
    InputError
        If they differ in size.
    """

    def __init__(self, after: NDArray[Any], before: NDArray[Any]) -> None:
        if after.size != before.size:
            raise InputError(f"an array of {before.size} values became one of {after.size}")
        self.size = after.size
        self._after = after.reshape(-1)
        self._before = before.reshape(-1)

    def __getitem__(self, place: slice) -> NDArray[np.float64]:
        """Return a block of it."""
        change: NDArray[np.float64] = np.subtract(
            self._after[place], self._before[place], dtype=np.float64
        )
        return change


class _Rounder:
    """Rounds numbers up or down by chance, block by block in buffers that it keeps.

    Parameters
    ----------
    key : bytes
        Of the AES-128 stream of the random bits: 16 bytes, used for nothing else.
    """

    def __init__(self, key: bytes) -> None:
        # Zeros as nonce, since the key is used for one stream alone.
        self._stream = Cipher(algorithms.AES128(key), modes.CTR(bytes(16))).encryptor()
        self._zeros = memoryview(bytes(2 * _BLOCK))
        self._bytes = memoryview(bytearray(2 * _BLOCK))
        self._random = np.frombuffer(self._bytes, "<u2")
        self._wide = np.empty(_BLOCK, np.int64)
        self._numbers = np.empty(_BLOCK, np.float64)
        self._bits = self._numbers.view(np.int64)

    def encode(
        self,
        values: NDArray[Any] | ArrayChange,
        part: Part,
        weight: float,
        noise: NDArray[Any] | None,
        words: NDArray[np.uint32],
    ) -> int:
        """Write a part's values as words, and return how many were clipped."""
        # The scale is a power of two, so this is the product with the weight first.
        factor = weight * part.scale
        clipped = 0
        for start in range(0, values.size, _BLOCK):
            place = slice(start, start + _BLOCK)
            block, outside = _within(values[place], part.bound)
            clipped += outside
            added = None if noise is None else _steps(noise[place], part)
            self._round(block, factor, weight > 1, added, words[place])
        return clipped

    def _round(
        self,
        values: NDArray[Any],
        factor: float,
        wraps: bool,
        added: NDArray[np.float64] | None,
        words: NDArray[np.uint32],
    ) -> None:
        size = values.size
        numbers = self._numbers[:size]
        bits = self._bits[:size]
        random = self._wide[:size]
        self._stream.update_into(self._zeros[: 2 * size], self._bytes[: 2 * size])
        np.copyto(random, self._random[:size])
        np.copyto(numbers, values)
        numbers *= factor
        if wraps:
            # Exact in float64.
            np.fmod(numbers, 2.0**32, out=numbers)
        if added is not None:
            numbers += added
        numbers += _SHIFT
        # From here on a whole number of 2^-16 steps. What lies above its 48 bits is dropped below.
        bits += random
        bits >>= _BITS
        np.copyto(words, bits, casting="unsafe")


def _check_words(words: NDArray[Any], kind: np.dtype[Any], size: int) -> None:
    if words.dtype != kind or words.shape != (size,):
        raise SecureError(
            f"a sum must be {size} words of {kind}, got {words.dtype} of shape {words.shape}"
        )


def _decode_fixed(words: NDArray[np.uint32], part: Part) -> NDArray[np.float64]:
    return np.multiply(words.view(np.int32), 1 / part.scale, dtype=np.float64)


def _encode_real(values: NDArray[Any], part: Part, weight: float, words: NDArray[np.uint64]) -> int:
    """Write the upper and then the lower word of each value; return how many were clipped."""
    inside, clipped = _within(values, part.bound)
    # Both remainders are exact in float64, since the bound is a power of two.
    scaled = inside.astype(np.float64) * (2.0**_UPPER / part.bound) * weight
    upper = np.rint(scaled)
    lower = np.rint((scaled - upper) * 2.0**_LOWER)
    if weight > 1:
        # Exact in float64, as are both differences; an int64 holds the result.
        upper = np.fmod(upper, 2.0**64)
        upper = np.where(upper >= 2.0**63, upper - 2.0**64, upper)
        upper = np.where(upper < -(2.0**63), upper + 2.0**64, upper)
    words[: part.size] = upper.astype(np.int64).view(np.uint64)
    words[part.size :] = lower.astype(np.int64).view(np.uint64)
    return clipped


def _decode_real(words: NDArray[np.uint64], part: Part, sites: int) -> NDArray[np.float64]:
    upper = words[: part.size].view(np.int64)
    lower = words[part.size :].view(np.int64)
    _check_within(upper, sites << _UPPER, part, sites)
    _check_within(lower, sites << (_LOWER - 1), part, sites)
    # What the lower words carry goes to the upper ones, so that the rest is exact in float64.
    carry = (lower + (1 << (_LOWER - 1))) >> _LOWER
    upper = upper + carry
    rest = (lower - (carry << _LOWER)) * 2.0**-_LOWER
    high = upper.astype(np.float64)
    rest += upper - high.astype(np.int64)
    sums: NDArray[np.float64] = (high + rest) * (part.bound / 2.0**_UPPER)
    _check_within(sums, sites * part.bound, part, sites)
    return sums


def _counts(array: NDArray[Any], part: Part) -> NDArray[np.uint64]:
    if array.dtype.kind not in "biuf":
        raise InputError(f"part {part.name!r} must be whole numbers, got {array.dtype}")
    # The error does not show the values: they are a hospital's own.
    if array.size and not (array.min() >= 0 and array.max() < _COUNTS):
        raise InputError(f"part {part.name!r} must be whole numbers from 0 to below 2^56")
    whole = array.astype(np.uint64)
    if array.dtype.kind == "f" and (whole != array).any():
        raise InputError(f"part {part.name!r} must be whole numbers, got one with a fraction")
    return whole


def _decode_counts(words: NDArray[np.uint64], part: Part, sites: int) -> NDArray[np.int64]:
    largest = min(sites * (_COUNTS - 1), _LARGEST_SUM)
    _check_within(words, largest, part, sites)
    return words.astype(np.int64)


def _check_within(sums: NDArray[Any], largest: float, part: Part, sites: int) -> None:
    if sums.size and not (sums.min() >= -largest and sums.max() <= largest):
        raise SecureError(
            f"the sum of part {part.name!r} is one that {sites} hospitals cannot have: a hospital "
            "sent wrong words, or the masks do not cancel"
        )
