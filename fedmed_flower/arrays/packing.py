"""A record of arrays as its change in a code: what a hospital sends with compression.

What is coded is the change of the floating-point entries that are trained, against the record that
was sent. Others, such as ``num_batches_tracked``, travel as they are; so do running statistics,
which the server names. They are no sums of changes, to which what was lost could be added later: a
variance would become negative. The parts of all entries, one after
the other in the order of their names, are one array for each part (``.codes`` and ``.scales``,
and with ``"top-k"`` indices), since each array of a message has a header that is longer than many a
bias. Their lengths follow from the record that was sent, so that they are checked before anything
is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord
from numpy.typing import NDArray

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.compression import NONE, Code, Parts, code_of
from fedmed_flower.arrays.views import Draft, Form, Forms, form_of, view
from fedmed_flower.errors import InputError
from fedmed_flower.wire import COMPRESSION, TOP_K_SHARE, UNCODED

# No entry of a network has a name that begins with it.
_PART = "."


class Packed(NamedTuple):
    """A record in a code.

    Attributes
    ----------
    coded : ArrayRecord
    residual : dict of str to ndarray
        What the code has lost of each coded entry, to be added to the next change.
    """

    coded: ArrayRecord
    residual: dict[str, NDArray[Any]]


class Packing:
    """Codes records of arrays, and decodes them.

    Parameters
    ----------
    compression : {"int8", "int4", "top-k"}
    top_k_share : float
        As in `code_of`.
    code : Code
        The code of that name.
    uncoded : collection of str
        Keys of further entries that travel as they are.
    """

    def __init__(
        self, compression: str, top_k_share: float, code: Code, uncoded: Collection[str]
    ) -> None:
        self.compression = compression
        self.top_k_share = top_k_share
        self._code = code
        self._uncoded = frozenset(uncoded)
        self._dtypes = {part: dtype for part, (_, dtype) in self._sizes(0).items()}

    @classmethod
    def named(
        cls, compression: str, top_k_share: float, uncoded: Collection[str] = ()
    ) -> Self | None:
        """Return the packing of a name; None for ``"none"``.

        Parameters
        ----------
        compression, top_k_share, uncoded
            As above.

        Raises
        ------
        InputError
            As `code_of`.
        """
        code = code_of(compression, top_k_share)
        return None if code is None else cls(compression, top_k_share, code, uncoded)

    @classmethod
    def of(cls, config: ConfigRecord) -> Self | None:
        """Return the packing for which a message asks; None if it asks for none.

        Raises
        ------
        InputError
            As `code_of`.
        """
        share = config.get(TOP_K_SHARE, 1.0)
        if not isinstance(share, int | float):
            raise InputError(f"{TOP_K_SHARE} must be a number, got {share!r}")
        uncoded = config.get(UNCODED, [])
        if not isinstance(uncoded, list):
            raise InputError(f"{UNCODED} must be a list of names, got {uncoded!r}")
        return cls.named(str(config.get(COMPRESSION, NONE)), share, [str(key) for key in uncoded])

    @property
    def config(self) -> dict[str, str | float | list[str]]:
        """The keys of a message that asks for this packing."""
        return {
            COMPRESSION: self.compression,
            TOP_K_SHARE: self.top_k_share,
            UNCODED: sorted(self._uncoded),
        }

    def forms(self, sent: ArrayRecord) -> Forms:
        """Return shape and dtype of each array of a coded record, by key.

        Parameters
        ----------
        sent : ArrayRecord
            The record against which changes are coded.

        Raises
        ------
        InputError
            If an entry that travels as it is has the name of a part.
        """
        forms: dict[str, Form] = {}
        lengths = dict.fromkeys(self._dtypes, 0)
        for key, array in sent.items():
            shape, dtype = form_of(array)
            if self._codes(key, dtype):
                for part, (length, _) in self._sizes(math.prod(shape)).items():
                    lengths[part] += length
            elif key in lengths:
                raise InputError(
                    f'compression="{self.compression}" needs the name {key} for itself: rename '
                    "the array of the model"
                )
            else:
                forms[key] = (shape, dtype)
        return forms | {part: ((lengths[part],), dtype) for part, dtype in self._dtypes.items()}

    def is_coded(self, record: ArrayRecord) -> bool:
        """Return whether a record has a part of the code."""
        return not self._dtypes.keys().isdisjoint(record)

    def pack(
        self, sent: ArrayRecord, new: ArrayRecord, residual: Mapping[str, NDArray[Any]]
    ) -> Packed:
        """Code the change from `sent` to `new`.

        Parameters
        ----------
        sent : ArrayRecord
        new : ArrayRecord
            Keys and shapes are those of `sent`.
        residual : mapping of str to ndarray
            What was lost before, by key: flat arrays. An entry that is missing has lost nothing.

        Returns
        -------
        Packed
            If a change is not finite, neither are its parts nor its residual.

        Raises
        ------
        ValueError
            If `new` or `residual` has other keys or shapes.
        """
        parts: dict[str, list[NDArray[Any]]] = {part: [] for part in self._dtypes}
        coded = {}
        lost = {}
        if sent.keys() != new.keys():
            raise ValueError("the arrays have other keys than those that were sent")
        for key in sorted(sent):
            before = view(sent[key])
            after = view(new[key])
            if after.shape != before.shape:
                raise ValueError(f"{key} has the shape {after.shape}, sent was {before.shape}")
            if not self._codes(key, before.dtype):
                coded[key] = new[key]
                continue
            wanted = kernels.widen(after.reshape(-1)).astype(np.float64)
            if key in residual:
                if residual[key].shape != wanted.shape:
                    raise ValueError(
                        f"what was lost of {key} before has the shape {residual[key].shape}, "
                        f"now it is {wanted.shape}"
                    )
                wanted += residual[key]
            with np.errstate(invalid="ignore", over="ignore"):
                encoded = self._code.encode(wanted - kernels.widen(before.reshape(-1)))
                reached = self._moved(before, encoded)
                wanted -= kernels.widen(reached)
                # The error of the dtype's own rounding is a part of it.
                lost[key] = wanted.astype(kernels.working(before.dtype))
            for part, values in encoded.items():
                parts[f"{_PART}{part}"].append(values)
        for part, dtype in self._dtypes.items():
            coded[part] = Array(np.concatenate([np.empty(0, dtype), *parts[part]]))
        return Packed(ArrayRecord(coded), lost)

    def unpack(self, sent: ArrayRecord, coded: ArrayRecord) -> ArrayRecord:
        """Return the record that a coded one stands for: what was sent, plus the change.

        Parameters
        ----------
        sent : ArrayRecord
        coded : ArrayRecord
            Of the `forms` of `sent`.

        Raises
        ------
        ValueError
            If it stands for no finite change. The sum may still overflow.
        """
        draft = Draft(sent)
        pieces = self._pieces(sent, coded)
        for (key, array), out in zip(sent.items(), draft.row, strict=True):
            before = view(array)
            if key not in pieces:
                out[...] = view(coded[key]).reshape(-1)
                continue
            parts = pieces[key]
            try:
                self._code.check(parts, before.size)
            except ValueError as error:
                raise ValueError(f"in the code of {key}, {error}") from error
            with np.errstate(over="ignore"):
                out[...] = self._moved(before, parts)
        return draft.finish()

    def _moved(self, before: NDArray[Any], parts: Parts) -> NDArray[Any]:
        """Return an entry plus the change in a code, flat and in the entry's dtype."""
        moved = self._code.decode(parts, before.size)
        moved += kernels.widen(before.reshape(-1))
        return kernels.narrow(moved, before.dtype)

    def _pieces(self, sent: ArrayRecord, coded: ArrayRecord) -> dict[str, Parts]:
        """Return the parts of each floating-point entry, by its key."""
        whole = {part: view(coded[part]) for part in self._dtypes}
        starts = dict.fromkeys(whole, 0)
        pieces: dict[str, Parts] = {}
        # Records of both sides have the same keys, not always in the same order.
        for key in sorted(sent):
            shape, dtype = form_of(sent[key])
            if not self._codes(key, dtype):
                continue
            own = {}
            for part, (length, _) in self._sizes(math.prod(shape)).items():
                start = starts[part]
                starts[part] = start + length
                own[part.removeprefix(_PART)] = whole[part][start : start + length]
            pieces[key] = own
        return pieces

    def _codes(self, key: str, dtype: np.dtype[Any]) -> bool:
        """Return whether the change of an entry is coded."""
        return kernels.is_floating(dtype) and key not in self._uncoded

    def _sizes(self, size: int) -> dict[str, tuple[int, np.dtype[Any]]]:
        """Return length and dtype of each part of one entry, by the part's key."""
        return {f"{_PART}{part}": form for part, form in self._code.sizes(size).items()}
