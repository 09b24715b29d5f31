"""All that travels between server and hospitals: every key, record and reply, one line each.

`MESSAGES` is what a server sends, `REPLIES` what a hospital sends back and how it leaves:
`plain`: as it is. `bounded`: as it is, but of the fewest patients that the hospital allows.
`known`: taken as known in every guarantee. `noised`: with noise that was charged, or following from
such numbers alone. `never`: not.

``docs/privacy.md`` has the same tables; a test holds messages and replies themselves against them.
The report names by them what each hospital has in fact sent.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from flwr.app import RecordDict

# Keys of a message's config. Flower's own:
SERVER_ROUND, PROXIMAL_MU = "server-round", "proximal-mu"
# Which rows are evaluated; whether all sites' rows together are meant, in a simulation.
SPLIT, POOL_SITES = "split", "pool-sites"
# One name for all rounds of a run; in a simulation, where its sites keep their ledgers.
RUN_KEY, LEDGER_DIR = "run-key", "ledger-dir"
# The digest of the model's part that does not travel, which every site must have too.
FROZEN = "frozen-digest"
# What all sites agreed upon before the first round, in each site's every message.
AGREED = "agreed"
# How the trees of several hospitals make one ensemble; which part of a round's step a site has.
TREES, TREE_SHARE = "trees", "tree-share"
# How many pictures or variants are asked for, and from which variant on.
COUNT, OFFSET = "count", "offset"
# A question for statistics; whether counts of an association study have squares.
REQUEST, SQUARES = "request", "squares"

# Records of a reply.
SITE_RECORD, PATIENTS_RECORD = "site", "patients"
CONTRIBUTION, PICTURES, STATISTICS = "contribution", "pictures", "statistics"
COHORT, VARIANTS, PLACES, TOLD = "cohort", "variants", "places", "told"
# Which variants a hospital is asked for, in a message of an association study.
BLOCK = "block"
# Entries of them.
DIGESTS, DIGEST_BYTES = "digests", 8
TITLES, IMAGES, ANSWER = "titles", "images", "answer"
TURNED_AWAY = "turned-away"
# Of a site's own model: its main figure on validation rows, before and after, and the passes kept.
PERSONAL = ("val-global", "val-own", "personal-epochs")
# What a run has cost a patient of a site; of several sites, the most.
EPSILON = "patient-epsilon"
# What the rounds have cost a hospital, by the server's noise.
HOSPITAL_EPSILON = "hospital-epsilon"

# How the reply of a hospital begins that does not take part, for a reason that it may tell.
DECLINED = "declined: "
# Stands for all sites together where a site's name is expected.
ALL_SITES = "all"

NEVER = "never"


class Entry(NamedTuple):
    """One record of a reply.

    Attributes
    ----------
    reply : str
        To which kind of message: ``train``, ``evaluate``, the name of a query, or ``any``.
    key : str
        Name of the record and of its entry. ``CLASS``, ``COLUMN`` and ``FIGURE`` stand for any.
    what : str
        In words.
    plain, private : str
        How it leaves in a plain run, and in a private one or where the hospital has a budget.
    """

    reply: str
    key: str
    what: str
    plain: str
    private: str


class Sending(NamedTuple):
    """One record of a message.

    Attributes
    ----------
    message : str
        Kind of message: ``train``, ``evaluate``, the name of a query, or ``any``.
    key : str
        Name of the record and of its entry.
    what : str
        In words.
    writer, reader : str
        Which file of the server writes it, and which of the hospital reads it.
    """

    message: str
    key: str
    what: str
    writer: str
    reader: str


_MESSAGES = """
any | config.run-key | name of the run, for ledger and book | runs/experiment | clients/base
any | config.ledger-dir | simulation: folder of the ledgers | runs/experiment | privacy/patient
any | config.agreed | what all sites agreed upon | runs/experiment | clients/base
any | config.frozen-digest | digest of what does not travel | runs/experiment | clients/base
any | config.pool-sites | simulation: all rows together | runs/baselines | clients/base
train | arrays.* | the global model | strategies/base | clients/app
train | config.server-round | number of the round | Flower | clients/app
train | config.proximal-mu | weight of the proximal term | Flower | clients/app
train | config.trees | bagging or cyclic | trees/server | trees/client
train | config.tree-share | the site's part of a step | trees/server | trees/client
evaluate | arrays.* | the global model | strategies/base | clients/app
evaluate | config.server-round | number of the round | Flower | clients/app
evaluate | config.split | val or test rows | strategies/base | clients/app
evaluate | config.trees | bagging or cyclic | trees/server | trees/client
pictures | arrays.* | the last model | runs/roll_call | clients/queries
pictures | config.count | how many cases | runs/roll_call | clients/queries
personal | arrays.* | the last model | runs/roll_call | clients/personal
statistics | config.request | the question | statistics/server | statistics/client
variants | config.offset | where to begin | genomics/rounds | genomics/client
variants | config.count | how many variants | genomics/rounds | genomics/client
counts | config.squares | whether squares are needed | genomics/rounds | genomics/client
counts | block.lines | which variants | genomics/rounds | genomics/client
counts | block.swapped | whose alleles change places | genomics/rounds | genomics/client
linear | block.lines | which variants | genomics/rounds | genomics/client
linear | block.swapped | whose alleles change places | genomics/rounds | genomics/client
logistic | block.lines | which variants | genomics/rounds | genomics/client
logistic | block.swapped | whose alleles change places | genomics/rounds | genomics/client
logistic | block.slopes | coefficients so far | genomics/rounds | genomics/client
logistic | block.intercepts | the site's own coefficient | genomics/rounds | genomics/client
loadings | block.lines | which variants | genomics/rounds | genomics/client
loadings | block.swapped | whose alleles change places | genomics/rounds | genomics/client
loadings | block.frequencies | allele frequencies | genomics/rounds | genomics/client
loadings | block.loadings | components so far | genomics/rounds | genomics/client
scores | block.lines | which variants | genomics/rounds | genomics/client
scores | block.swapped | whose alleles change places | genomics/rounds | genomics/client
scores | block.frequencies | allele frequencies | genomics/rounds | genomics/client
scores | block.loadings | the components | genomics/rounds | genomics/client
"""
MESSAGES = tuple(
    Sending(*(cell.strip() for cell in line.split("|"))) for line in _MESSAGES.strip().splitlines()
)

_REPLIES = """
any | site.name | the name that the hospital gave itself | plain | plain
any | site.simulated | whether it lives in a simulation | plain | plain
any | site.data | name of the data source | plain | plain
any | site.generated | whether the rows are made up | plain | plain
describe | metrics.num-examples | number of training rows, once more | plain | known
describe | metrics.train | number of training rows (private: of patients) | plain | known
describe | metrics.val | number of validation rows (private: of patients) | plain | known
describe | metrics.test | number of test rows (private: of patients) | plain | known
describe | metrics.turned-away | number of rows that could not be used | plain | never
contribution | contribution.moments COLUMN | moments of a column | bounded | never
contribution | contribution.categories COLUMN | categories of ten patients or more | bounded | never
contribution | contribution.counts COLUMN | how many patients have each | bounded | never
train | arrays.* | the model after local training | bounded | noised
train | metrics.num-examples | number of training rows (private: of patients) | plain | known
train | metrics.loss | mean training loss | bounded | never
train | metrics.seconds | how long training took | plain | never
train | metrics.patient-epsilon | what the run has cost a patient so far | never | known
evaluate | metrics.num-examples | number of rows (private: of patients, noised) | plain | noised
evaluate | metrics.loss | mean loss | bounded | never
evaluate | metrics.accuracy | accuracy | bounded | noised
evaluate | metrics.balanced-accuracy | balanced accuracy | bounded | noised
evaluate | metrics.sensitivity | sensitivity | bounded | noised
evaluate | metrics.specificity | specificity | bounded | noised
evaluate | metrics.auc | AUC | bounded | noised
evaluate | metrics.average-precision | average precision | bounded | never
evaluate | metrics.brier | Brier score | bounded | never
evaluate | metrics.calibration-error | calibration error | bounded | never
evaluate | metrics.confusion-counts | rows by class and answer | bounded | never
evaluate | metrics.score-grid | median, spread and AUC of the scores | bounded | never
evaluate | metrics.score-counts | histograms of the score by class, 2,048 bins | bounded | never
evaluate | metrics.calibration-sums | sums of ten calibration bins | bounded | never
evaluate | metrics.noised-counts | histograms in 32 fixed bins, confusion counts | never | noised
evaluate | metrics.target-sums | sums of a number, its squares and its errors | bounded | never
evaluate | metrics.mae | mean absolute error | bounded | noised
evaluate | metrics.rmse | root of the mean squared error | bounded | never
evaluate | metrics.r2 | explained variance | bounded | never
evaluate | metrics.count-sums | sums of a predicted count and its errors | bounded | never
evaluate | metrics.deviance | mean deviance | bounded | never
evaluate | metrics.d2 | explained deviance | bounded | never
evaluate | metrics.noised-errors | patients and the sum of their clipped errors | never | noised
evaluate | metrics.c-index | concordance index | bounded | never
evaluate | metrics.concordance-pairs | concordant, tied and comparable pairs | bounded | never
evaluate | metrics.integrated-brier | integrated Brier score | bounded | never
evaluate | metrics.dice | mean Dice | bounded | noised
evaluate | metrics.dice-CLASS | mean Dice of each class | bounded | noised
evaluate | metrics.dice-worst | Dice of the worst patient | bounded | never
evaluate | metrics.hd95 | mean distance of outlines | bounded | never
evaluate | metrics.hd95-CLASS | mean distance of each class's outlines | bounded | never
evaluate | metrics.surface-dice | mean surface Dice | bounded | never
evaluate | metrics.surface-dice-CLASS | mean surface Dice of each class | bounded | never
evaluate | metrics.noised-dice | number of patients and sums of their Dice | never | noised
evaluate | metrics.FIGURE@column=value | each figure above, of a group (report-by) | bounded | never
pictures | pictures.titles | what each picture shows | bounded | plain
pictures | pictures.images | up to six pictures of test cases | bounded | plain
personal | metrics.val-global | main validation figure of the global model | bounded | never
personal | metrics.val-own | main validation figure of its own model | bounded | never
personal | metrics.personal-epochs | passes after which its own was kept | plain | never
personal | metrics.FIGURE | figures of evaluate, of its own model | bounded | never
statistics | statistics.answer | answer to a question for statistics | bounded | noised
cohort | cohort.people | people of a study | bounded | never
cohort | cohort.cases | those with the trait | bounded | never
cohort | cohort.variants | variants in the file | plain | never
cohort | cohort.trait | binary or continuous | plain | never
cohort | cohort.phenotype | name of the trait's column | plain | never
cohort | cohort.covariates | names of the covariates' columns | plain | never
cohort | cohort.minimum | its `min-cell-count` | plain | never
variants | variants.names | ids of the variants | plain | never
variants | variants.first | alleles A1 | plain | never
variants | variants.second | alleles A2 | plain | never
variants | variants.offset | where the next lines begin | plain | never
variants | places.chromosomes | chromosomes of the variants | plain | never
variants | places.positions | positions of the variants | plain | never
counts | told.values | people and copies by case status | bounded | never
linear | told.values | sums of products of copies, covariates, trait | bounded | never
logistic | told.values | score and information of a Newton step | bounded | never
logistic | told.withheld | variants in which one person weighs too much | bounded | never
loadings | told.values | sums from which genotypes can be computed | plain | never
"""
REPLIES = tuple(
    Entry(*(cell.strip() for cell in line.split("|"))) for line in _REPLIES.strip().splitlines()
)

# What a simulation adds, where nothing leaves.
SIMULATED = {
    "patients.digests": "digests of patients' names",
    "metrics.labels": "number of training rows of each class",
}
# Records that only a private reply has: what stands beside them leaves as in a private run.
_PRIVATE = {entry.key for entry in REPLIES if entry.plain == NEVER}


def keys_of(reply: str, content: RecordDict) -> set[str]:
    """Return the keys of a reply as `REPLIES` has them.

    Parameters
    ----------
    reply : str
        To which kind of message, as in `Entry`.
    content : RecordDict
    """
    return {_generic(reply, name, str(key)) for name, record in content.items() for key in record}


def _generic(reply: str, name: str, key: str) -> str:
    if name == "arrays":
        return "arrays.*"
    metric, _, group = key.partition("@")
    if name == "metrics" and reply == "evaluate" and group:
        return "metrics.FIGURE@column=value"
    own = metric.startswith("val-") or metric == "personal-epochs"
    if name == "metrics" and reply == "personal" and not own:
        return "metrics.FIGURE"
    metric = re.sub(r"^(dice|hd95|surface-dice)-(?!worst$).*", r"\1-CLASS", metric)
    metric = re.sub(r"^(moments|categories|counts) .*", r"\1 COLUMN", metric)
    return f"{name}.{metric}"


def noised_evaluation(keys: Collection[str]) -> bool:
    """Return whether an evaluation with these keys carries noise, or tells no figure."""
    figures = {entry.key for entry in REPLIES if entry.reply == "evaluate"}
    figures.discard("metrics.num-examples")
    return figures.isdisjoint(keys) or not _PRIVATE.isdisjoint(keys)


class Line(NamedTuple):
    """What several sites have sent alike.

    Attributes
    ----------
    reply : str
        As in `Entry`.
    how : str
        As `Entry.plain`; ``simulated`` for what only a simulation sends, ``unlisted`` for what is
        not in `REPLIES`, such as a figure of the app's own.
    sites, what : tuple of str
    """

    reply: str
    how: str
    sites: tuple[str, ...]
    what: tuple[str, ...]


def _place(reply: str) -> int:
    order = [*dict.fromkeys(entry.reply for entry in REPLIES)]
    return order.index(reply) if reply in order else len(order)


def _ways(entry: Entry | None, key: str, sites: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """Return the sites that have sent a key, by how it left them."""
    found: dict[str, list[str]] = {}
    for site, keys in sites.items():
        if entry is None:
            how = "simulated" if key in SIMULATED else "unlisted"
        else:
            how = entry.plain if _PRIVATE.isdisjoint(keys) else entry.private
        if key in keys:
            found.setdefault(how, []).append(site)
    return found


@dataclass
class Sent:
    """What each site has in fact sent.

    Attributes
    ----------
    keys : dict
        Keys as `REPLIES` has them, by the kind of reply and the name of the site.
    """

    keys: dict[str, dict[str, set[str]]] = field(default_factory=dict)

    def take(self, reply: str, site: str, content: RecordDict) -> None:
        """Take up a reply, whether it could be used or not."""
        self.keys.setdefault(reply, {}).setdefault(site, set()).update(keys_of(reply, content))

    def add(self, other: Sent) -> None:
        """Take up what others have taken up."""
        for reply, sites in other.keys.items():
            for site, keys in sites.items():
                self.keys.setdefault(reply, {}).setdefault(site, set()).update(keys)

    def table(self) -> dict[str, dict[str, list[str]]]:
        """Return the keys as JSON has them, in order."""
        return {
            reply: {site: sorted(keys) for site, keys in sorted(sites.items())}
            for reply, sites in sorted(self.keys.items())
        }

    def lines(self) -> list[Line]:
        """Return what was sent, together what left alike from the same sites."""
        common = {entry.key for entry in REPLIES if entry.reply == "any"}
        found: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
        every: dict[str, set[str]] = {}
        for sites in self.keys.values():
            for site, keys in sites.items():
                every.setdefault(site, set()).update(keys & common)
        replies = {"any": every} | self.keys
        for reply in sorted(replies, key=_place):
            known = {entry.key: entry for entry in REPLIES if entry.reply == reply}
            sent = {key for keys in replies[reply].values() for key in keys}
            sent -= set() if reply == "any" else common
            for key in (*(key for key in known if key in sent), *sorted(sent - known.keys())):
                what = known[key].what if key in known else SIMULATED.get(key, key)
                for how, names in _ways(known.get(key), key, replies[reply]).items():
                    found.setdefault((reply, how, tuple(names)), []).append(what)
        return [Line(*alike, tuple(what)) for alike, what in found.items()]

    @classmethod
    def of(cls, table: Any) -> Self:
        """Return what `table` gave; what it cannot have given is left out."""
        found = cls()
        for reply, sites in table.items() if isinstance(table, dict) else ():
            for site, keys in sites.items() if isinstance(sites, dict) else ():
                if isinstance(keys, list):
                    names = {key for key in keys if isinstance(key, str)}
                    found.keys.setdefault(reply, {})[site] = names
        return found


def tell_error(site: str, text: str) -> str:
    """Return the reason of an error reply that names its site."""
    return f"site {site}: {text}"


def read_error(reason: str) -> tuple[str | None, str]:
    """Return site and text of a reason that `tell_error` made; None and the reason of another."""
    found = re.fullmatch(r"site (.+?): (.*)", reason, re.DOTALL)
    return (found[1], found[2]) if found else (None, reason)
