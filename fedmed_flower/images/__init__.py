"""Image files of hospitals: DICOM, NIfTI and others, pictures, and the masks of each."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.images.reading import read_image as read_image
    from fedmed_flower.images.reading import read_label as read_label
    from fedmed_flower.images.series import Series as Series

__getattr__, __all__ = on_demand(
    __name__, {"Series": "series", "read_image": "reading", "read_label": "reading"}
)
