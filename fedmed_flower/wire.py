"""All that travels between server and hospitals: every key, record and reply, one line each.

`MESSAGES` lists what a server sends. `REPLIES` lists what a hospital sends back, and how it leaves:
`plain`: unchanged. `bounded`: unchanged, but computed from at least the minimum number of patients
that the hospital sets. `known`: unchanged, and assumed to be known in every privacy guarantee.
`noised`: with noise that was charged, or computed from such numbers alone. `masked`: as a part of a
secure sum, under masks that only the sum over several hospitals is without. `never`: it does not
leave.

``docs/reference/what-travels.md`` has the same tables, and a test compares them with real messages
and replies.
The report uses them to list what each hospital has in fact sent.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    # The command `fedmed watch` reads names from here, and need not load Flower for them.
    from flwr.app import RecordDict

from fedmed_flower.errors import shown

# Of what a site has sent: how many keys of a record are listed, and letters of each.
_MOST_KEYS = 1000
_MOST_LETTERS = 200

# Of what is listed here: to be raised whenever server and hospital of different versions of this
# package would misunderstand each other. The roll call compares it.
MESSAGE_VERSION = 2

# Keys of a message's config. Flower's own:
SERVER_ROUND = "server-round"
PROXIMAL_MU = "proximal-mu"
# How the change of the model comes back, which share of the entries top-k keeps, and which entries
# come back as they are.
COMPRESSION = "compression"
TOP_K_SHARE = "top-k-share"
UNCODED = "uncoded"
# The method of which sites make use in training, and its settings as TOML.
METHOD = "method"
METHOD_SETTINGS = "method-settings"
# Which layers stay different at each site, and whether it sends them.
KEEP = "keep"
KEEP_SENT = "keep-sent"
# How many of the site's replies the server has taken so far: which state the site goes on from.
TAKEN = "replies-taken"
# Whether each site's own model is evaluated in place of the global one.
OWN = "own-model"
# Which rows are evaluated.
SPLIT = "split"
# Whether a site that trains also validates the model that came, which is that of the round before.
VALIDATE = "validate"
# Whether all sites' rows together are meant, in a simulation.
POOL_SITES = "pool-sites"
# One name for all rounds of a run.
RUN_KEY = "run-key"
# Where the sites of a simulation keep their ledgers.
LEDGER_DIR = "ledger-dir"
# The digest of the model's part that does not travel, which every site must have too.
FROZEN = "frozen-digest"
# What all sites agreed upon before the first round, in each site's every message.
AGREED = "agreed"
# How the trees of several hospitals make one ensemble.
TREES = "trees"
# Which part of a round's step a site has.
TREE_SHARE = "tree-share"
# How many pictures or variants are asked for.
COUNT = "count"
# From which variant on.
OFFSET = "offset"
# A question for statistics.
REQUEST = "request"
# Version of the messages, in the roll call and in each reply.
VERSION = "version"
# Whether counts of an association study have squares.
SQUARES = "squares"

# What a message asks for as a secure sum, and what a hospital sends to one.
SECURE = "secure"
# Entries of that record: the rules of the sum, the run, a letter or an answer, encoded; in a
# simulation also the folder of the hospitals' books.
RECORD = "record"
SECURE_RUN = "run"
ASKED = "asked"
LETTER = "letter"
BOOKS = "books"
# The masked vectors.
MASKED = "masked"
# What a handler has counted, by the name of the part of the sum. It does not leave unmasked.
SUMMANDS = "summands"

# What the names of records begin with that a method sends beside the model.
METHOD_RECORD = "method-"
# Records of a reply.
SITE_RECORD = "site"
PATIENTS_RECORD = "patients"
# How a site's rows have changed since the run began.
ROWS_RECORD = "rows"
CHANGES = "changes"
CONTRIBUTION = "contribution"
# The figures of a training reply for VALIDATE; or, of that name, why there are none.
VALIDATION = "validation"
WHY = "why"
PICTURES = "pictures"
STATISTICS = "statistics"
COHORT = "cohort"
# The question for it where the numbers of people are known as sums alone.
DESIGN = "design"
VARIANTS = "variants"
POSITIONS = "positions"
SUMS = "sums"
# Which variants a hospital is asked for, in a message of an association study.
BLOCK = "block"
# Their ids and alleles, where all hospitals are told the same.
NAMED = "named"
# What the server says of the models of these variants; and by which test.
MODELS = "models"
TEST = "test"
# Entries of these records.
DIGESTS = "digests"
DIGEST_BYTES = 8
TITLES = "titles"
IMAGES = "images"
ANSWER = "answer"
REJECTED = "rejected"
# Records of columns: those that a hospital's table lacks, and those without a value in any row.
LACKING = "lacking"
EMPTY = "empty"
COLUMNS = "columns"
# The common means of columns, about which hospitals sum squared distances.
MEANS = "means"
# The record that says which splits have rows, in place of their numbers.
FILLED = "filled"
# Of a site's own model: its main metric on validation rows, before and after, and the passes kept.
PERSONAL = ("val-global", "val-own", "personal-epochs")
# What a run has cost a patient of a site; of several sites, the most.
EPSILON = "patient-epsilon"
# What codes have saved in the replies of a round.
BYTES_SAVED = "bytes-saved"
# What the rounds have cost a hospital, by the server's noise.
HOSPITAL_EPSILON = "hospital-epsilon"

# How the reply of a hospital begins that does not take part, for a reason that it may send.
DECLINED = "declined: "
# Stands for all sites together where a site's name is expected.
ALL_SITES = "all"

# Kinds of messages, by what a hospital answers that sends its figures in secure sums alone: without
# any figure; as its part of a sum; so if asked by other messages; not at all. What an app adds is
# not answered either.
WITHOUT_FIGURES = ("describe", "hello", "alive", "unmask", "figures", "design", "variants")
IN_SUMS_OF_STUDIES = ("people", "totals", "products", "steps", "spreads")
IN_SUMS = ("train", "evaluate", "count", "contribution", "tallies", *IN_SUMS_OF_STUDIES)
OTHERWISE_IN_SUMS = ("statistics", "cohort", "counts", "linear", "logistic")
NOT_IN_SUMS = ("pictures", "personal", "loadings", "scores")

NEVER = "never"


class VersionError(ValueError):
    """The other side's messages have another version; the text says which and what to do."""


def require_version(found: object, site: str, other: str) -> None:
    """Refuse messages of another version.

    Parameters
    ----------
    found : object
        The version that the message names; None if it names none.
    site : str
        Name of the hospital, for the error.
    other : {"hospital", "server"}
        Whose message it is.

    Raises
    ------
    VersionError
        If it is not `MESSAGE_VERSION`.
    """
    if found is not None and type(found) is int and found == MESSAGE_VERSION:
        return
    here = "server" if other == "hospital" else "hospital"
    theirs = f"version {shown(found, _MOST_LETTERS)}"
    if found is None:
        theirs = "no version, as before versions were named"
    raise VersionError(
        f"{site}: messages of the {other} have {theirs}, and those of the {here} version "
        f"{MESSAGE_VERSION}: install the same fedmed-flower at both"
    )


class Entry(NamedTuple):
    """One record of a reply.

    Attributes
    ----------
    reply : str
        Kind of message that is answered: ``train``, ``evaluate``, the name of a query, or ``any``.
    key : str
        Name of the record and of its entry. ``CLASS``, ``COLUMN`` and ``METRIC`` are placeholders
        for any class, column and metric.
    what : str
        Description for readers.
    plain : str
        How the entry leaves in a plain run.
    private : str
        How it leaves in a private run, or if the hospital has a budget.
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
        Description for readers.
    writer, reader : str
        The module of the server that writes it, and the module of the hospital that reads it.
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
any | secure.record | who takes part in a secure sum, and how | server/secure | clients/secure
any | secure.books | simulation: folder of the sites' books | server/secure | clients/secure
figures | arrays.* | the global model | server/secure | clients/secure
figures | config.server-round | number of the round | server/secure | clients/secure
figures | config.split | val or test rows | server/secure | clients/secure
hello | secure.asked | name of the run | server/secure | clients/secure
alive | secure.asked | which sum, and which hospitals remain | server/secure | clients/secure
unmask | secure.asked | the same, with envelopes and signatures | server/secure | clients/secure
contribution | config.columns | columns whose means are known | runs/summed | clients/queries
contribution | config.means | means of all hospitals together | runs/summed | clients/queries
describe | config.version | version of the messages | runs/roll_call | clients/queries
statistics | config.version | version of the messages | statistics/server | clients/queries
cohort | config.version | version of the messages | genomics/panel | clients/queries
design | config.version | version of the messages | genomics/panel | clients/queries
tallies | config.version | version of the messages | statistics/sums | clients/queries
train | arrays.* | the global model | strategies/base | clients/app
train | config.server-round | number of the round | Flower | clients/app
train | config.proximal-mu | weight of the proximal term | Flower | clients/app
train | config.compression | in which code the reply comes | strategies/base | clients/compression
train | config.top-k-share | share of entries in top-k | strategies/base | clients/compression
train | config.uncoded | entries that come as they are | strategies/base | clients/compression
train | config.method | what sites do beside plain training | strategies/methods | clients/methods
train | config.method-settings | its settings, in TOML | strategies/methods | clients/methods
train | config.keep | layers that stay different | strategies/methods | clients/methods
train | config.keep-sent | whether they are sent | strategies/methods | clients/methods
train | config.replies-taken | its replies that counted | strategies/methods | clients/state
train | method.* | what the method needs beside the model | strategies/methods | clients/methods
train | config.validate | the model is validated too | strategies/base | clients/app
train | config.own-model | validate own model, not the global one | strategies/base | clients/app
train | config.trees | bagging or cyclic | trees/server | trees/client
train | config.tree-share | the site's part of a step | trees/server | trees/client
evaluate | arrays.* | the global model | strategies/base | clients/app
evaluate | config.server-round | number of the round | Flower | clients/app
evaluate | config.method | whose own model is measured | strategies/methods | clients/methods
evaluate | config.method-settings | its settings, in TOML | strategies/methods | clients/methods
evaluate | config.keep | layers that stay different | strategies/methods | clients/methods
evaluate | config.own-model | own model, not the global one | strategies/methods | clients/methods
evaluate | config.replies-taken | its replies that counted | strategies/methods | clients/state
evaluate | config.split | val or test rows | strategies/base | clients/app
evaluate | config.trees | bagging or cyclic | trees/server | trees/client
pictures | arrays.* | the last model | runs/roll_call | clients/queries
pictures | config.count | how many cases | runs/roll_call | clients/queries
personal | arrays.* | the last model | runs/roll_call | clients/personal
statistics | config.request | the question | statistics/server | statistics/client
tallies | config.request | the question | statistics/sums | statistics/client
tallies | models.asked | which figures | statistics/sums | statistics/client
tallies | models.centres | means of all together | statistics/sums | statistics/client
tallies | models.units | units of the columns | statistics/sums | statistics/client
variants | config.offset | where to begin | genomics/rounds | genomics/client
variants | config.count | how many variants | genomics/rounds | genomics/client
counts | config.squares | whether squares are needed | genomics/rounds | genomics/client
counts | block.lines | which variants | genomics/rounds | genomics/client
counts | block.swapped | which have A1 and A2 swapped | genomics/rounds | genomics/client
linear | block.lines | which variants | genomics/rounds | genomics/client
linear | block.swapped | which have A1 and A2 swapped | genomics/rounds | genomics/client
logistic | block.lines | which variants | genomics/rounds | genomics/client
logistic | block.swapped | which have A1 and A2 swapped | genomics/rounds | genomics/client
logistic | block.slopes | coefficients so far | genomics/rounds | genomics/client
logistic | block.intercepts | the site's own coefficient | genomics/rounds | genomics/client
loadings | block.lines | which variants | genomics/rounds | genomics/client
loadings | block.swapped | which have A1 and A2 swapped | genomics/rounds | genomics/client
loadings | block.frequencies | allele frequencies | genomics/rounds | genomics/client
loadings | block.loadings | components so far | genomics/rounds | genomics/client
totals | config.test | by which test | genomics/secure_rounds | genomics/secure_client
products | config.test | by which test | genomics/secure_rounds | genomics/secure_client
steps | config.test | by which test | genomics/secure_rounds | genomics/secure_client
spreads | config.test | by which test | genomics/secure_rounds | genomics/secure_client
totals | block.places | which variants | genomics/lookup | genomics/lookup
totals | named.* | their ids and alleles | genomics/lookup | genomics/lookup
products | block.places | which variants | genomics/lookup | genomics/lookup
products | named.* | their ids and alleles | genomics/lookup | genomics/lookup
products | models.units | units of the columns | genomics/secure_rounds | genomics/secure_client
steps | block.places | which variants | genomics/lookup | genomics/lookup
steps | named.* | their ids and alleles | genomics/lookup | genomics/lookup
steps | models.units | units of the columns | genomics/secure_rounds | genomics/secure_client
steps | models.slopes | coefficients so far | genomics/secure_rounds | genomics/secure_client
spreads | block.places | which variants | genomics/lookup | genomics/lookup
spreads | named.* | their ids and alleles | genomics/lookup | genomics/lookup
totals | models.units | units of the columns | genomics/secure_rounds | genomics/secure_client
spreads | models.units | units of the columns | genomics/secure_rounds | genomics/secure_client
spreads | models.slopes | coefficients | genomics/secure_rounds | genomics/secure_client
spreads | models.scale | how columns vary | genomics/secure_rounds | genomics/secure_client
spreads | models.centre | common effects | genomics/secure_rounds | genomics/secure_client
scores | block.lines | which variants | genomics/rounds | genomics/client
scores | block.swapped | which have A1 and A2 swapped | genomics/rounds | genomics/client
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
any | site.version | version of its messages | plain | plain
any | secure.letter | keys, signatures, shares of masks | plain | plain
describe | metrics.num-examples | number of training rows, as Flower names it | plain | known
describe | metrics.train | number of training rows (private: of patients) | plain | known
describe | metrics.val | number of validation rows (private: of patients) | plain | known
describe | metrics.test | number of test rows (private: of patients) | plain | known
describe | filled.train | whether it has training rows, in place of numbers | plain | known
describe | filled.val | whether it has validation rows, in place of numbers | plain | known
describe | filled.test | whether it has test rows, in place of numbers | plain | known
describe | lacking.columns | columns of the schema that its table lacks | plain | never
describe | empty.columns | columns of the schema without a value in any row | bounded | never
describe | metrics.rejected | number of rows that could not be used | plain | never
count | masked.* | number of training rows, as a part of a secure sum | masked | masked
contribution | contribution.moments COLUMN | moments of a column | bounded | never
contribution | contribution.categories COLUMN | categories of ten patients or more | bounded | never
contribution | contribution.counts COLUMN | how many patients have each | bounded | never
contribution | masked.* | moments of columns, as a part of a secure sum | masked | never
train | arrays.* | the model after local training, or its change in a code | bounded | noised
train | method.* | what the method makes of training, such as SCAFFOLD's control | bounded | noised
train | metrics.num-examples | number of training rows (private: of patients) | plain | known
train | metrics.loss | mean training loss | bounded | never
train | rows.changes | whether patients have come or gone in the run | plain | never
train | metrics.seconds | how long training took | plain | never
train | validation.* | what evaluate would reply, with validate="next" | bounded | noised
train | validation.why | why there are no such figures | plain | plain
train | metrics.patient-epsilon | what the run has cost a patient so far | never | known
train | masked.* | change of the model and mean loss, as a part of a secure sum | masked | masked
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
evaluate | metrics.METRIC@column=value | each metric above, of a group (report-by) | bounded | never
evaluate | masked.* | counts and sums of metrics, as a part of a secure sum | masked | masked
pictures | pictures.titles | what each picture shows | plain | plain
pictures | pictures.images | up to six pictures of test cases, each of one patient | plain | plain
personal | metrics.val-global | main validation metric of the global model | bounded | never
personal | metrics.val-own | main validation metric of its own model | bounded | never
personal | metrics.personal-epochs | passes after which its own was kept | plain | never
personal | metrics.METRIC | metrics of evaluate, of its own model | bounded | never
statistics | statistics.answer | answer to a question for statistics | bounded | noised
tallies | masked.* | figures of statistics, as a part of a secure sum | masked | never
cohort | cohort.people | people of a study | bounded | never
cohort | cohort.cases | those with the trait | bounded | never
cohort | cohort.variants | variants in the file | plain | never
cohort | cohort.trait | binary or continuous | plain | never
cohort | cohort.phenotype | name of the trait's column | plain | never
cohort | cohort.covariates | names of the covariates' columns | plain | never
cohort | cohort.minimum | its `min-cell-count` | plain | never
design | cohort.variants | variants in the file | plain | never
design | cohort.trait | binary or continuous | plain | never
design | cohort.phenotype | name of the trait's column | plain | never
design | cohort.covariates | names of the covariates' columns | plain | never
design | cohort.minimum | its `min-cell-count` | plain | never
people | masked.* | people, cases, spreads, as a part of a secure sum | masked | never
totals | masked.* | people and copies by case status, as a part of a secure sum | masked | never
products | masked.* | sums of products, as a part of a secure sum | masked | never
steps | masked.* | score and information, as a part of a secure sum | masked | never
spreads | masked.* | weights of own effects, as a part of a secure sum | masked | never
variants | variants.names | ids of the variants | plain | never
variants | variants.first | alleles A1 | plain | never
variants | variants.second | alleles A2 | plain | never
variants | variants.offset | where the next lines begin | plain | never
variants | positions.chromosomes | chromosomes of the variants | plain | never
variants | positions.positions | positions of the variants | plain | never
counts | sums.values | people and copies by case status | bounded | never
linear | sums.values | sums of products of copies, covariates, trait | bounded | never
logistic | sums.values | score and information of a Newton step | bounded | never
logistic | sums.withheld | variants in which one person weighs too much | bounded | never
loadings | sums.values | sums from which genotypes can be computed | plain | never
"""
REPLIES = tuple(
    Entry(*(cell.strip() for cell in line.split("|"))) for line in _REPLIES.strip().splitlines()
)

# What a simulation sends besides; nothing of it leaves the machine.
SIMULATED = {
    "patients.digests": "digests of patients' names",
    "metrics.labels": "number of training rows of each class",
}
# Records that only a private reply has: what stands beside them leaves as in a private run.
_PRIVATE = {entry.key for entry in REPLIES if entry.plain == NEVER}


def keys_of(reply: str, content: RecordDict) -> set[str]:
    """Return the keys of a reply in the notation of `REPLIES`; of a record the first thousand.

    Parameters
    ----------
    reply : str
        Kind of message that is answered, as in `Entry`.
    content : RecordDict
    """
    return {
        _generic(reply, name, str(key)[:_MOST_LETTERS])
        for name, record in islice(content.items(), _MOST_KEYS)
        for key in islice(record, _MOST_KEYS)
    }


def _generic(reply: str, name: str, key: str) -> str:
    if name == "arrays":
        return "arrays.*"
    if name == MASKED:
        return "masked.*"
    if name.startswith(METHOD_RECORD):
        return "method.*"
    if name == VALIDATION and key != WHY:
        return "validation.*"
    metric, _, group = key.partition("@")
    if name == "metrics" and reply == "evaluate" and group:
        return "metrics.METRIC@column=value"
    listed = metric.startswith("val-") or metric == "personal-epochs"
    if name == "metrics" and reply == "personal" and not listed:
        return "metrics.METRIC"
    metric = re.sub(r"^(dice|hd95|surface-dice)-(?!worst$).*", r"\1-CLASS", metric)
    metric = re.sub(r"^(moments|categories|counts) .*", r"\1 COLUMN", metric)
    return f"{name}.{metric}"


def noised_evaluation(keys: Collection[str]) -> bool:
    """Return whether an evaluation with these keys carries noise or contains no metric at all."""
    metrics = {entry.key for entry in REPLIES if entry.reply == "evaluate"}
    metrics.discard("metrics.num-examples")
    return metrics.isdisjoint(keys) or not _PRIVATE.isdisjoint(keys)


class Line(NamedTuple):
    """Entries that left the same sites in the same way.

    Attributes
    ----------
    reply : str
        As in `Entry`.
    how : str
        As `Entry.plain`. Also ``simulated`` for an entry that only a simulation sends, and
        ``unlisted`` for one that is not in `REPLIES`, such as a metric that the app adds.
    sites : tuple of str
        Names of the sites.
    what : tuple of str
        Descriptions of the entries, as `Entry.what`.
    """

    reply: str
    how: str
    sites: tuple[str, ...]
    what: tuple[str, ...]


def _order(reply: str) -> int:
    order = [*dict.fromkeys(entry.reply for entry in REPLIES)]
    return order.index(reply) if reply in order else len(order)


def _ways(entry: Entry | None, key: str, sites: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """Return the names of the sites that have sent a key, by how it left."""
    sites_of: dict[str, list[str]] = {}
    for site, keys in sites.items():
        if entry is None:
            how = "simulated" if key in SIMULATED else "unlisted"
        else:
            how = entry.plain if _PRIVATE.isdisjoint(keys) else entry.private
        if key in keys:
            sites_of.setdefault(how, []).append(site)
    return sites_of


@dataclass
class Sent:
    """What each site has in fact sent.

    Attributes
    ----------
    keys : dict
        Keys in the notation of `REPLIES`, by the kind of reply and the name of the site.
    """

    keys: dict[str, dict[str, set[str]]] = field(default_factory=dict)

    def take(self, reply: str, site: str, content: RecordDict) -> None:
        """Record the keys of a reply, even if the reply could not be used."""
        self.keys.setdefault(reply, {}).setdefault(site, set()).update(keys_of(reply, content))

    def add(self, other: Sent) -> None:
        """Add the keys that another `Sent` has recorded."""
        for reply, sites in other.keys.items():
            for site, keys in sites.items():
                self.keys.setdefault(reply, {}).setdefault(site, set()).update(keys)

    def table(self) -> dict[str, dict[str, list[str]]]:
        """Return the sorted keys as lists and dicts, for JSON."""
        return {
            reply: {site: sorted(keys) for site, keys in sorted(sites.items())}
            for reply, sites in sorted(self.keys.items())
        }

    @property
    def noised(self) -> set[str]:
        """The sites that have evaluated by counts with noise."""
        sites = self.keys.get("evaluate", {})
        return {site for site, keys in sites.items() if not _PRIVATE.isdisjoint(keys)}

    @property
    def exact_in_private_run(self) -> set[str]:
        """The sites that have evaluated without noise, if any site has trained with noise."""
        trained = self.keys.get("train", {}).values()
        if not any(f"metrics.{EPSILON}" in keys for keys in trained):
            return set()
        evaluated = self.keys.get("evaluate", {})
        return {site for site, keys in evaluated.items() if not noised_evaluation(keys)}

    def lines(self) -> list[Line]:
        """Return what was sent, grouped by reply, way of leaving, and sites."""
        common = {entry.key for entry in REPLIES if entry.reply == "any"}
        lines: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
        every: dict[str, set[str]] = {}
        for sites in self.keys.values():
            for site, keys in sites.items():
                every.setdefault(site, set()).update(keys & common)
        replies = {"any": every} | self.keys
        for reply in sorted(replies, key=_order):
            known = {entry.key: entry for entry in REPLIES if entry.reply == reply}
            sent = {key for keys in replies[reply].values() for key in keys}
            sent -= set() if reply == "any" else common
            for key in (*(key for key in known if key in sent), *sorted(sent - known.keys())):
                what = known[key].what if key in known else SIMULATED.get(key, key)
                for how, names in _ways(known.get(key), key, replies[reply]).items():
                    lines.setdefault((reply, how, tuple(names)), []).append(what)
        return [Line(*alike, tuple(what)) for alike, what in lines.items()]

    @classmethod
    def of(cls, table: Any) -> Self:
        """Read a result of `table`; parts that `table` cannot have returned are ignored."""
        sent = cls()
        for reply, sites in table.items() if isinstance(table, dict) else ():
            for site, keys in sites.items() if isinstance(sites, dict) else ():
                if isinstance(keys, list):
                    names = {key for key in keys if isinstance(key, str)}
                    sent.keys.setdefault(reply, {})[site] = names
        return sent


def error_reason(site: str, text: str) -> str:
    """Return the reason of an error reply that names its site."""
    return f"site {site}: {text}"


def read_error(reason: str) -> tuple[str | None, str]:
    """Split a reason that `error_reason` made into site and text; else the site is None."""
    match = re.fullmatch(r"site (.+?): (.*)", reason, re.DOTALL)
    return (match[1], match[2]) if match else (None, reason)
