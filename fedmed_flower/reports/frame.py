"""The frame of a report, and what it says of a hospital's data in every run."""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from fedmed_flower.data.site import GENERATED
from fedmed_flower.metrics.names import FINDING, GRADE, KAPPA

DASH = "–"
COUNT = ",.0f"  # format of a number of records, patients or rounds
# For more hospitals than these a table shows the spread, and its rows are folded away.
MANY = 30
# A table with more columns is set smaller.
ROOMY = 9
_MOST_CELLS = 10_000_000
# What the metrics are called in a sentence.
CLASSIFIED = {"auc": "AUC", "accuracy": "accuracy", "balanced-accuracy": "balanced accuracy"}
CLASSIFIED |= {"sensitivity": "sensitivity", "specificity": "specificity"}
OUTLINED = {"dice": "Dice", "hd95": "HD95 (mm)", "surface-dice": "surface Dice"}
WORST_PATIENT = "dice-worst"
PREDICTED = {"average-precision": "average precision", "brier": "Brier score"}
PREDICTED |= {"calibration-error": "calibration error", "c-index": "C-index"}
PREDICTED |= {"integrated-brier": "integrated Brier score", "r2": "R²", "d2": "D²", "mae": "MAE"}
PREDICTED |= {"rmse": "RMSE", "deviance": "deviance"}
PREDICTED |= {KAPPA: "quadratic weighted kappa"}
NAMES = CLASSIFIED | OUTLINED | PREDICTED
NAMES |= {WORST_PATIENT: "Dice, worst patient", "loss": "loss"}
# Metrics shown of groups of patients and of findings, beside the main one.
GROUPED = ("auc", "sensitivity", "specificity", "calibration-error", "hd95", "surface-dice", "mae")
# In an SVG these become CSS variables, so that plots follow the colour scheme.
SCHEME = {"#010203": "var(--soft)", "#010204": "var(--line)", "#010205": "var(--paper)"}
INK, FAINT, PAPER = SCHEME

# One file, which loads nothing: the style and the script stand in it, and nothing else may run.
_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>$title</title>
<style>$style</style></head><body><a class="skip" href="#main">Skip to the content</a>
$banner<main id="main">$body</main><script>$script</script></body></html>
""")
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src '$style'; "
_POLICY += "script-src '$script'"
_HEADING = re.compile(r"<h2>(.*?)</h2>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
# A page with fewer sections needs no list of them.
_FEW = 3
BANNER = f'<p class="banner" role="note">{GENERATED}</p>'
# Why a hospital lacks the main metric.
UNDEFINED = {
    "auc": "† one class only in this test set. ",
    "c-index": "† no two patients in this test set whose times can be compared. ",
}
NOISED_UNDEFINED = "† too few test patients to tell by counts with noise. "
UNDEFINED |= dict.fromkeys(("r2", "d2"), "† the same value in all of this test set. ")
COUNTED_WITH_NOISE = "These metrics are counted with noise: small differences mean nothing. "
NOISED_ROUNDS = """<p class="note">Validation figures are counted with noise: with few patients they
say little.</p>"""
OWN_ROUNDS = """<p class="note">Validation figures are of each hospital’s own model, not of the
global one.</p>"""
NOTES = {
    KAPPA: "Quadratic weighted kappa: how well grades agree beyond chance, an error of two grades "
    "counting four times one of one grade; 1 is perfect, 0 is chance. ",
    "auc": "AUC: how often a record with the finding or outcome is scored above one without; "
    "0.500 is chance. ",
    "average-precision": "Average precision: the share of true alarms, averaged over all "
    "thresholds; chance is the share of records with the outcome. ",
    "brier": "Brier score: the squared error of the predicted probability; 0 is perfect. ",
    "calibration-error": "Calibration error: how far predicted probabilities lie from what came "
    "true, on average; 0 is perfect. ",
    "c-index": "C-index: of two patients of one hospital, how often the one with the higher "
    "predicted risk has the event first; 0.500 is chance. ",
    "integrated-brier": "Integrated Brier score: the squared error of the predicted chance to be "
    "without the event, averaged over the time up to the horizon; 0 is perfect. ",
    "r2": "R²: the share of the variance that the model explains; 0 is as good as the mean. ",
    "d2": "D²: the share of the deviance that the model explains; 0 is as good as the mean. ",
    "mae": "MAE: mean absolute error, in the unit of what is predicted. ",
    "rmse": "RMSE: root of the mean squared error, in the unit of what is predicted. ",
    "deviance": "Deviance: Poisson’s, the mean distance of expected and true counts; 0 is "
    "perfect. ",
    "dice": "Dice: overlap of the predicted structure with the true one; 1 is perfect, 0 if a "
    "structure is missed or invented. ",
    "hd95": "HD95: the distance in mm within which 95% of the two outlines lie of each other; "
    "if a structure is missed or invented, the image’s diagonal. ",
    "surface-dice": "Surface Dice: the part of the outlines that lies within a tolerance of the "
    "other. ",
}
BETWEEN = """Some hospitals report coarsely: they send no AUC (†) if a class has fewer than ten
patients, and not the order of records with similar scores.
The AUC of all records lies between the two small numbers; the one above them is an estimate. """
CASES = """<p>Pictures of single test images, as hospitals chose to send them. They show what the
model does; how well it does so is in the tables above. A click or the enter key makes one
large. """
LINES = "Outlines are solid as the hospital drew them, dashed as the model does.</p>"
HEAT = """In a heat map orange places speak for the class or finding that the title names, or for
a higher number or grade; blue ones speak against it.</p>"""
REJECTED = "Rejected: records that cannot be used; the hospital’s own log says which. "
WITHHELD = "Numbers of records are withheld (secure sums)"
# Added to what the page may load if it shows pictures.
_EMBEDDED = "; img-src data:"
# To what a hospital replied.
REPLIED = {
    "any": "With each reply",
    "describe": "Before the first round",
    "count": "Before the first round, of training rows",
    "contribution": "Before the first round, of columns",
    "train": "After training",
    "evaluate": "After evaluation",
    "pictures": "Pictures",
    "personal": "Of its own model",
}
# How it left.
WAYS = {
    "plain": "exactly",
    "bounded": "exactly, of several patients together",
    "known": "exactly; every guarantee takes it as known",
    "noised": "with noise",
    "masked": "under masks: only sums over hospitals can be read",
    "never": "exactly, although noise was due",
    "simulated": "in a simulation alone",
    "unlisted": "as the app has it",
}
LEFT = """<h2>What left each hospital</h2><p>{stays} The table holds what the hospitals in fact
sent. “Several patients” are at least the number that the hospital sets: ten at a real hospital by
default, one in a simulation. A hospital that reports coarsely also rounds. If a hospital fails in a
round, it sends the class of the error; if it declines a round, the reason.</p>"""
NOT_RECORDED = "<p>What was sent was not recorded.</p>"
NO_RECORD = "No patient record: no image, no row of a table."
PICTURES = """No patient record, and of images only the pictures of test cases above with their
titles; each shows one patient, and no bound on privacy covers them."""
GROUPS = """A hospital sends nothing of a group of fewer than ten patients (unless it has set
another number), nor of one that would follow from the others; all together are those of the
hospitals that report the group. Small groups differ by chance."""
# Of what is predicted of each patient, by the name that stands in the place of a group's column.
BY_PREDICTED = {
    FINDING: "Of each finding, on the records in which it was read; all together are those of the "
    "hospitals that read it in enough patients. The figures of all findings are means over these, "
    "each finding counting the same. ",
    GRADE: "How well records of a grade or above are told from those below it. ",
}
UNPROTECTED = """<p>Privacy accounting is not part of this run: nothing here bounds what could be
inferred about one patient from what was sent without noise.</p>"""
HOSPITAL = """<p>Unit: the hospital. Whether a whole hospital took part is hidden, in the models of
all rounds together, to epsilon <b>{epsilon}</b> at delta {delta}, by noise that the server added.
The server itself, and its files with each hospital’s numbers, are not covered.</p>"""
HOSPITALS = """<p>Unit: the hospital. What each hospital gave to the models of all rounds together
is hidden, to epsilon <b>{epsilon}</b> at delta {delta}, by noise of which each added a share. It
holds as long as no more hospitals work with the server than their study allows for. Who took part
is not hidden.</p>"""
NO_PATIENT = "<p>Nothing here bounds what could be inferred about one patient.</p>"
PATIENT = """<p>Unit: the patient, with all records, in or out. What the models of all rounds
together disclose about any one training patient is bounded by the run’s target, epsilon
<b>{target}</b> at delta {delta}, by clipping and noise at the hospital; the hospitals reported
<b>{epsilon}</b> at most. What other runs have cost the same patients is in each hospital’s own
ledger. """
SHARED = """The noise is that of secure sums over several hospitals, each of which added a share: it
holds as long as no more hospitals work with the server than their study allows for. """
NOISED = """Evaluation counts carry noise too, and cost a validation or test patient no more than
the target. Not covered: the numbers of records, and which rounds a hospital declined.</p>"""
EXACT = """Not covered, since it carries no noise: numbers of records, and all that is measured on
validation and test patients.</p>"""
SPENT = """<p class="note">Epsilon that the rounds so far have cost a patient of each hospital; the
dashed line is the run’s target.</p>"""
COMPARED = """<p>Each model for comparison is a run of its own: what it cost the patients it was
trained and tested on is in the ledgers and not in this table.</p>"""


def page(title: str, body: str, banner: str = "", pictures: bool = False) -> str:
    """Return a whole page: one file that loads nothing and runs nothing but its own script.

    Parameters
    ----------
    title, body, banner
        As HTML. Each ``<h2>`` of the body can be linked to, and the first ``<nav></nav>`` is filled
        with such links.
    pictures
        Whether the body has pictures, which are embedded.
    """
    titles: list[str] = []

    def numbered(heading: re.Match[str]) -> str:
        titles.append(_TAG.sub("", heading[1]))
        return f'<h2 id="s{len(titles)}">{heading[1]}</h2>'

    body = _HEADING.sub(numbered, body)
    links = "".join(
        f'<li><a href="#s{number}">{text}</a></li>' for number, text in enumerate(titles, start=1)
    )
    listed = f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if len(titles) > _FEW else ""
    style = own_file("style.css")
    script = own_file("script.js")
    policy = Template(_POLICY).substitute(style=_digest(style), script=_digest(script))
    return _PAGE.substitute(
        policy=policy + (_EMBEDDED if pictures else ""),
        title=title,
        style=style,
        banner=banner,
        body=body.replace("<nav></nav>", listed, 1),
        script=script,
    )


@cache
def own_file(name: str) -> str:
    """Return the text of a file of this folder, such as ``style.css``."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Return a text as a Content-Security-Policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def escaped(value: Any) -> str:
    """Return what was read from a file as text for the page, one line without control codes."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    clean = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    return DASH if value is None or value == "" else html.escape(clean)


def format_value(value: float | None, spec: str = ".3f") -> str:
    """Return a number to three digits after the point at most; a dash for none."""
    return DASH if value is None else format(round(value, 3) + 0.0, spec).replace("-", "−")


def require_small(*sides: int) -> None:
    """Raise `ValueError` if a table or a drawing would have more cells than can be worked on."""
    if (cells := math.prod(sides)) > _MOST_CELLS:
        raise ValueError(f"a part of it would have {cells:,} cells, more than {_MOST_CELLS:,}")


def natural(text: str) -> str:
    """Return what sorts names as people number them: hospital-2 before hospital-10."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(9), text)


def count_of(count: float, noun: str) -> str:
    """Return a number of things."""
    return f"{count:,.0f} {noun}{'' if count == 1 else 's'}"


def name(key: str) -> str:
    """Return what a metric is called in a sentence, as HTML."""
    return escaped(plain_name(key))


def plain_name(key: str) -> str:
    """Return what a metric is called, as text; ``dice-NAME`` is the Dice of a class."""
    return NAMES.get(key) or f"Dice {key.removeprefix('dice-')}"


def title(key: str) -> str:
    """Return what a metric is called at the head of a column."""
    return capital(name(key))


def capital(text: str) -> str:
    """Return a text as it begins a sentence."""
    return text[:1].upper() + text[1:]


def format_of(key: str) -> str:
    """Return the format of a metric."""
    return ".1f" if key.startswith("hd95") else ",.3f"


def unseen(text: str) -> str:
    """Return a text, as HTML, for those who hear the page: it is not seen."""
    return f'<span class="hidden">{text}</span>'


def folded(content: str, hospitals: int, more: str = "") -> str:
    """Return the content, folded behind a summary line if there are more than `MANY` hospitals."""
    if hospitals <= MANY:
        return content
    title = f"All {count_of(hospitals, 'hospital')}{more}"
    return f"<details><summary>{title}</summary>{content}</details>"


def table(
    caption: str,
    head: Any,
    rows: Iterable[Any],
    foot: Any = (),
    kind: str = "",
    sites: Sequence[str] = (),
) -> str:
    """Return a table; of each row and of the head the first cell is its name.

    `sites` are the hospitals of the rows, as texts, if each row is of one.
    """
    top = [f'<th scope="col">{cell}</th>' for cell in head]
    kind += " tight" if len(top) > ROOMY else ""
    line = '<tr{}><th scope="row">{}</th><td>{}</td></tr>\n'.format
    of_rows = [f' data-site="{escaped(site)}"' for site in sites]
    body, end = (
        "".join(line(next(named, ""), name, "</td><td>".join(cells)) for name, *cells in part)
        for part, named in ((rows, iter(of_rows)), (foot, iter(())))
    )
    table = (
        f'<table class="{kind.strip()}"><caption>{caption}</caption><thead><tr>{"".join(top)}</tr>'
    )
    table += f"</thead><tbody>{body}</tbody>{f'<tfoot>{end}</tfoot>' if end else ''}</table>"
    return wide(table, _TAG.sub("", caption))


def wide(content: str, label: str) -> str:
    """Return what may be wider than a narrow window: it can be scrolled, also by keyboard."""
    return f'<div class="wide" tabindex="0" role="group" aria-label="{label}">{content}</div>'
