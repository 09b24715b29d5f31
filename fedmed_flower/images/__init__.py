"""Image files of hospitals: DICOM, NIfTI and others, pictures, and the masks of each."""
