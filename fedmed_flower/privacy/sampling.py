"""Poisson sampling of patients, as privacy accounting assumes it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from fedmed_flower.errors import InputError
from fedmed_flower.privacy.noise import secure_generator
from fedmed_flower.settings.privacy import ONE, RECORDS


class PatientSampler:
    """Draws the patients of each step, independently and with the same probability.

    The operating system keys the generator: privacy amplification by sampling holds only if nobody
    knows who was drawn.

    Parameters
    ----------
    patients : sequence of hashable
        The patient of each record.
    sampling_rate : float
        Above 0, at most 1.
    records : {"one", "mean"}
        What a drawn patient contributes: one record, drawn again each time, or all records.
    num_patients : int, optional
        Number of patients, including those without a usable record. By default the number of
        patients in `patients`.

    Attributes
    ----------
    num_patients : int
    expected : float
        Mean number of patients in a draw, by which the sum of their gradients is divided. If
        `num_patients` includes patients without a usable record, `expected` does not reveal how
        many they are.

    Raises
    ------
    InputError
        If there is no patient, or if a value is out of range.
    """

    def __init__(
        self,
        patients: Sequence[Hashable],
        sampling_rate: float,
        records: str = ONE,
        num_patients: int | None = None,
    ) -> None:
        if not 0 < sampling_rate <= 1:
            raise InputError(f"sampling_rate must be above 0 and at most 1, got {sampling_rate}")
        if records not in RECORDS:
            raise InputError(f"records must be one of {', '.join(RECORDS)}, got {records!r}")
        groups: dict[Hashable, list[int]] = {}
        for index, patient in enumerate(patients):
            groups.setdefault(patient, []).append(index)
        count = len(groups) if num_patients is None else num_patients
        if not count:
            raise InputError("there is no patient to draw")
        if count < len(groups):
            raise InputError(f"num_patients must be at least {len(groups)}, got {count}")
        self._groups = list(groups.values())
        self._rate = sampling_rate
        self._one_record = records == ONE
        self._generator = secure_generator()
        self.num_patients = count
        self.expected = sampling_rate * self.num_patients

    def draw(self) -> list[list[int]]:
        """Draw the patients of a step, and return the indices of their records that contribute.

        Returns
        -------
        list of lists of int
            One list per drawn patient, never an empty one. If nobody was drawn, there is no list.
        """
        drawn = self._generator.random(len(self._groups)) < self._rate
        chosen = [group for group, taken in zip(self._groups, drawn, strict=True) if taken]
        if not self._one_record:
            return chosen
        return [[group[self._generator.integers(len(group))]] for group in chosen]
