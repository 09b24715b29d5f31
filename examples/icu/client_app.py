"""An intensive care unit that predicts which of its patients die in hospital."""

from dataclasses import dataclass

import numpy as np

from fedmed_flower import InputError, Site, SiteData, TabularClient
from fedmed_flower.data.cohorts import ICU_FLAGS, ICU_RANGES, ICU_SOURCE, intensive_care
from fedmed_flower.data.schema import Schema, table_of
from fedmed_flower.data.splits import split_patients
from fedmed_flower.settings import Section, Within, setting


@dataclass(frozen=True)
class Fold(Section):
    """Which hospitals take no part in training."""

    fold: int = setting(0, "The quarter of the hospitals that only tests the model.", Within(0, 3))


class IntensiveCareUnit(TabularClient):
    sections = (Fold,)
    schema = Schema(
        target="died",
        task="binary",
        numeric=tuple(ICU_RANGES),
        ranges=ICU_RANGES,
        categorical=("gender", "unit", *ICU_FLAGS),
        categories={
            "gender": ("Female", "Male"),
            "unit": (
                *("Med-Surg ICU", "MICU", "CCU-CTICU", "Cardiac ICU", "SICU", "Neuro ICU"),
                *("CTICU", "CSICU"),
            ),
            **dict.fromkeys(ICU_FLAGS, ("0", "1")),
        },
        bands={"age": (50, 65, 80)},
        indicators=True,
    )

    def load_data(self, site: Site) -> SiteData:
        frame = _stays(site.data_dir)
        hospitals = np.unique(frame["hospital"])
        if site.index >= len(hospitals):
            raise InputError(f"there are {len(hospitals)} hospitals: give --sites {len(hospitals)}")
        held_out = self._held_out(len(hospitals))
        # Who was in two hospitals counts at one, and where trained on is no test elsewhere.
        tested = frame["hospital"].isin(hospitals[sorted(held_out)])
        once = frame.loc[tested.sort_values(kind="stable").index].drop_duplicates("patient")
        home = frame["patient"].map(once.set_index("patient")["hospital"])
        own = frame[(frame["hospital"] == hospitals[site.index]) & (frame["hospital"] == home)]
        table = table_of(own, self.schema, f"{ICU_SOURCE}, hospital {hospitals[site.index]}")
        if site.index in held_out:
            # A hospital that takes no part in training tests the model on all of its patients.
            away = table.rejected
            return SiteData(train=(), test=table.rows, source=ICU_SOURCE, rejected=away)
        splits = split_patients(table.rows, self.settings.seed, (0.85, 0.15, 0.0))
        return SiteData(**splits, source=ICU_SOURCE, rejected=table.rejected)

    def _held_out(self, count: int) -> set[int]:
        """Return which hospitals take no part in training: one quarter of all."""
        fold = Fold.from_run_config(self.context.run_config).fold
        order = np.random.default_rng(self.settings.seed).permutation(count)
        return set(order[fold::4].tolist())


_kept = {}


def _stays(folder):
    """Return the table of all hospitals, which is read once."""
    if folder not in _kept:
        _kept[folder] = intensive_care(folder)
    return _kept[folder]


app = IntensiveCareUnit.client_app()
