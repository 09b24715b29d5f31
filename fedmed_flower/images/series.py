"""One stack of slices of a DICOM series, whichever folders its files lie in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """A row's ``image``: the files of one DICOM series, or of one stack of it.

    Attributes
    ----------
    uid : str
        Its SeriesInstanceUID.
    files : tuple of str
        Paths, in any order; a file of many frames may be the only one.
    part : str
        Which stack, if the series has several, such as ``b=1000``; else empty.
    """

    uid: str
    files: tuple[str, ...]
    part: str = ""

    def __str__(self) -> str:
        """Name the first file, since a series may share its folder with others."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}{f' ({self.part})' if self.part else ''}"
