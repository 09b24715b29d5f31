"""Poisson sampling of patients: the draw that the accounting assumes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from fedmed_flower.errors import InputError
from fedmed_flower.privacy.noise import secure_generator
from fedmed_flower.settings.privacy import ONE, RECORDS


class PatientSampler:
    """Draws patients for each step, every one on its own with the same probability.

    The draws come from a generator that the operating system keys: whoever knew them would know
    more than the amplification by sampling allows for.

    Parameters
    ----------
    patients : sequence of hashable
        The patient of each record.
    sampling_rate : float
        Above 0, at most 1.
    records : {"one", "mean"}
        What a drawn patient contributes: one record, drawn again each time, or all of them.
    num_patients : int, optional
        Those without a record are among them; else those of `patients` alone.

    Attributes
    ----------
    num_patients : int
    expected : float
        Patients of a draw on average: what the sum of their gradients is divided by. With patients
        whose records cannot be used among them, it does not tell how many these are.

    Raises
    ------
    InputError
        If there is no patient or a value is out of range.
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
        self._rate, self._one = sampling_rate, records == ONE
        self._generator = secure_generator()
        self.num_patients = count
        self.expected = sampling_rate * self.num_patients

    def draw(self) -> list[list[int]]:
        """Return, for each patient of a step, the places of the records that contribute.

        Returns
        -------
        list of lists of int
            None of the inner ones empty; the outer one is where nobody was drawn.
        """
        drawn = self._generator.random(len(self._groups)) < self._rate
        chosen = [group for group, taken in zip(self._groups, drawn, strict=True) if taken]
        if not self._one:
            return chosen
        return [[group[self._generator.integers(len(group))]] for group in chosen]
