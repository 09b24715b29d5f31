"""The items of TRIPOD+AI, and what a run can say of each.

Collins et al., TRIPOD+AI statement: updated guidance for reporting clinical prediction models that
use regression or machine learning methods, BMJ 385, 2024, e078378,
https://doi.org/10.1136/bmj-2023-078378. The subjects are in our words.
"""

from __future__ import annotations

from typing import NamedTuple

# How far a run answers an item.
FROM_RUN = "from the run"
IN_PART = "in part"
BY_HAND = "to be filled in"

SUMMARY = "Summary"
USE = "Intended use"
DATA = "Data"
OUTCOME = "Outcome and predictors"
TRAINING = "Training"
RESULTS = "Results"
CALIBRATION = "Calibration"
BENEFIT = "Net benefit"
GROUPS = "Groups of patients"
PRIVACY = "Privacy"
LIMITS = "Failures and limits"
VERSIONS = "Versions and files"
DECLARATIONS = "Declarations"


class Item(NamedTuple):
    """An item: its number, its subject, the section of the card, and how far the run answers it."""

    number: str
    subject: str
    section: str
    answered: str = BY_HAND


ITEMS = (
    Item("1", "title: model, population and outcome", SUMMARY, IN_PART),
    Item("2", "abstract", SUMMARY),
    Item("3a", "clinical context, reason for the model, earlier models", USE),
    Item("3b", "target population, purpose, place in care, users", USE),
    Item("3c", "known inequalities in health", USE),
    Item("4", "objectives: development, evaluation or both", USE),
    Item("5a", "sources of the data, how representative they are", DATA, IN_PART),
    Item("5b", "dates of the data", DATA),
    Item("6a", "setting, number and location of centres", DATA, IN_PART),
    Item("6b", "who was eligible", DATA),
    Item("6c", "treatments", DATA),
    Item("7", "preparation and quality checks of the data", DATA, IN_PART),
    Item("8a", "outcome: definition, horizon, how it was assessed", OUTCOME, IN_PART),
    Item("8b", "outcome: who assessed it", OUTCOME),
    Item("8c", "outcome: blinding", OUTCOME),
    Item("9a", "predictors: how they were chosen", OUTCOME),
    Item("9b", "predictors: definition and measurement", OUTCOME),
    Item("9c", "predictors: who assessed them", OUTCOME),
    Item("10", "sample size", DATA),
    Item("11", "missing data", DATA),
    Item("12a", "how data were split and used", DATA, FROM_RUN),
    Item("12b", "how predictors entered the model", OUTCOME),
    Item("12c", "type of model, how it was built and chosen", TRAINING, IN_PART),
    Item("12d", "differences between clusters, such as hospitals: method", RESULTS, FROM_RUN),
    Item("12e", "measures of performance", RESULTS, FROM_RUN),
    Item("12f", "updating of the model: method", RESULTS, IN_PART),
    Item("12g", "how predictions were computed", VERSIONS, IN_PART),
    Item("13", "imbalance of classes", TRAINING),
    Item("14", "approach to fairness", GROUPS, IN_PART),
    Item("15", "output of the model, thresholds", RESULTS, IN_PART),
    Item("16", "differences between training and evaluation data", DATA, IN_PART),
    Item("17", "ethical approval, consent", DECLARATIONS),
    Item("18a", "funding", DECLARATIONS),
    Item("18b", "conflicts of interest", DECLARATIONS),
    Item("18c", "protocol", DECLARATIONS),
    Item("18d", "registration", DECLARATIONS),
    Item("18e", "availability of data", DECLARATIONS),
    Item("18f", "availability of code", DECLARATIONS),
    Item("19", "involvement of patients and the public", DECLARATIONS),
    Item("20a", "flow and number of participants, with and without the outcome", DATA, IN_PART),
    Item("20b", "characteristics of participants, by source", DATA),
    Item("20c", "evaluation data beside training data", DATA),
    Item("21", "participants and events in each analysis", DATA, IN_PART),
    Item("22", "the full model, access to it", VERSIONS, IN_PART),
    Item("23a", "performance with intervals, also by subgroup", RESULTS, FROM_RUN),
    Item("23b", "performance by cluster, such as hospitals", RESULTS, FROM_RUN),
    Item("24", "updating of the model: results", RESULTS, IN_PART),
    Item("25", "interpretation", LIMITS),
    Item("26", "limitations", LIMITS, IN_PART),
    Item("27a", "input of poor quality in use", USE),
    Item("27b", "users' part and expertise", USE),
    Item("27c", "next steps", USE),
)


# Items of another section that a section is about too.
_ALSO = {
    CALIBRATION: ("12e", "23a"),
    BENEFIT: ("12e", "23a"),
    GROUPS: ("23a",),
    VERSIONS: ("12c",),
}


def numbers(section: str) -> str:
    """Return the numbers of a section's items, as its heading names them; empty if it has none."""
    also = _ALSO.get(section, ())
    listed = [i.number for i in ITEMS if i.section == section or i.number in also]
    if not listed:
        return ""
    return f"TRIPOD+AI {'item' if len(listed) == 1 else 'items'} {', '.join(listed)}"


def left_over(section: str) -> list[Item]:
    """Return a section's items that people have to write or to complete."""
    return [item for item in ITEMS if item.section == section and item.answered != FROM_RUN]


def to_fill(item: Item) -> str:
    """Return the mark, in Markdown, where people have to write about an item."""
    mark = "To complete" if item.answered == IN_PART else "To be filled in"
    return f"**{mark}:** {item.subject} ({item.number})"
