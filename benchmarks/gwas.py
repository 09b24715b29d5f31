"""An association study over five hospitals against PLINK on the pooled file; its time and memory.

Against PLINK (where ``plink1.9`` is found): the 503 people of genotypes-lct (``FEDMED_DATA``), with
each population one hospital, and the run's ``min-cell-count`` 1, so that nothing is withheld.
Traits and ages are generated. PLINK's clusters are the hospitals, or one indicator a hospital is
among its covariates. Of each test the table gives the largest relative difference

- from statsmodels or numpy on the people of each hospital, or on all with an indicator, and
- from what PLINK prints, which has 4 significant digits, so that 5e-4 is what rounding makes of
  equal numbers; with ``--plink2`` from what PLINK 2 prints, which has 6.

Traits that no variant influences, where the northern hospitals have a prevalence of .6 and the
southern ones of .2: inflation and hits of the default test, of the allelic test and of PLINK's with
the hospitals as clusters (``--mh``) and without (``--assoc``).

Time and memory: five generated filesets, read from disk by the real client, in one process each.

    OMP_NUM_THREADS=1 FEDMED_DATA=... python benchmarks/gwas.py [--variants 500000] [--people 500]
"""

import argparse
import csv
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import documented
import numpy as np
import statsmodels.api as sm
from bed_reader import open_bed
from flwr.serverapp import ServerApp
from scipy import stats
from statsmodels.stats.contingency_tables import StratifiedTable

from fedmed_flower import SiteData, run_local
from fedmed_flower.genomics.client import GenomicsClient
from fedmed_flower.genomics.server import associate

POPULATIONS = ("CEU", "FIN", "GBR", "IBS", "TSI")
NORTH = ("CEU", "FIN", "GBR")
HIT = "rs4988235"
SITES = 5
# Of the traits without an effect: how many, and the share of cases in the north and the south.
NULL_TRAITS = 20
PREVALENCES = (0.6, 0.2)


class Hospital(GenomicsClient):
    """A hospital whose files and rows are those of its number."""

    folder, rows = Path(), ()

    def load_data(self, site):
        """Return the rows."""
        return SiteData(self.rows[site.index], source="benchmark", generated=True)

    def genotypes(self, site):
        """Return the path of the files."""
        return self.folder / f"site{site.index}"


def study(client, out, **config):
    server = ServerApp()

    @server.main()
    def main(grid, context):
        associate(grid, context)

    config = {"run-dir": str(out), "min-cell-count": 1} | config
    run_local(server, client.client_app(), SITES, run_config=config, app_name="benchmark")
    with (out / "association.csv").open(newline="") as file:
        return {line["id"]: line for line in csv.DictReader(file)}


def call(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stdout[-800:]}{done.stderr[-400:]}")


def table(path, where=("TEST", None)):
    """Return the lines of a table that PLINK wrote, by variant."""
    lines = [line.split() for line in path.read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    name = "SNP" if "SNP" in lines[0] else "ID"
    return {row[name]: row for row in rows if where[1] is None or row[where[0]] == where[1]}


def apart(pairs):
    """Return the largest relative difference, and of how many numbers."""
    known = np.array([(a, b) for a, b in pairs if np.isfinite(a) and np.isfinite(b) and b], float)
    one_sided = sum(np.isfinite(a) != np.isfinite(b) for a, b in pairs)
    return float(np.max(np.abs(known[:, 0] / known[:, 1] - 1))), len(known), one_sided


def number(text):
    return float("nan") if text in ("NA", ".") else float(text)


def show(what, pairs):
    """Print the largest relative difference and return it as a cell."""
    difference, count, one_sided = apart(pairs)
    extra = f"; {one_sided} with a result on one side only" if one_sided else ""
    print(f"  {what:<64}{difference:10.1e}   ({count} variants{extra})", flush=True)
    return short(f"{difference:.1e}")


def short(text):
    """Return a number without the zeros before its exponent."""
    return re.sub(r"e([-+])0+", r"e\1", text)


class Lactase:
    """The pooled file, and its five parts."""

    def __init__(self, folder, source, options=("--keep-allele-order",)):
        self.folder, self.source = folder, source
        with (source.parent / "LCT.pop.csv").open(newline="") as file:
            populations = {row["iid"]: row["population"] for row in csv.DictReader(file)}
        with open_bed(f"{source}.bed") as file:
            self.copies, self.people = file.read(), [str(name) for name in file.iid]
            self.names = [str(name) for name in file.sid]
        self.site = np.array([POPULATIONS.index(populations[name]) for name in self.people])
        generator = np.random.default_rng(0)
        count, hit = len(self.people), self.copies[:, self.names.index(HIT)]
        self.age = generator.normal(50, 12, count).round()
        risk = -1.5 + 1.6 * hit + 0.02 * (self.age - 50)
        self.traits = {
            "persistence": (generator.random(count) < 1 / (1 + np.exp(-risk))).astype(float),
            "level": (0.6 * hit + 0.01 * self.age + generator.normal(size=count)).round(6),
        }
        north = np.isin(self.site, [POPULATIONS.index(name) for name in NORTH])
        prevalence = np.where(north, *PREVALENCES)
        for number in range(NULL_TRAITS):
            self.traits[f"null{number}"] = (generator.random(count) < prevalence).astype(float)
        clusters = zip(self.people, self.site, strict=True)
        self.clusters = folder / "clusters.txt"
        self.clusters.write_text("".join(f"{name} {name} {site}\n" for name, site in clusters))
        for site in range(SITES):
            keep = folder / f"keep{site}.txt"
            own = np.flatnonzero(self.site == site)
            keep.write_text("".join(f"{self.people[i]} {self.people[i]}\n" for i in own))
            files = ("--bfile", source, "--keep", keep, "--out", folder / f"site{site}")
            call("plink1.9", *files, "--make-bed", *options)

    def client(self, trait, covariates=()):
        """Return a client whose hospitals are the populations."""
        rows = [
            [
                {"patient": self.people[i], "phenotype": self.traits[trait][i], "age": self.age[i]}
                for i in np.flatnonzero(self.site == site)
            ]
            for site in range(SITES)
        ]
        kind = "continuous" if trait == "level" else "binary"
        own = {"folder": self.folder, "rows": rows, "trait": kind, "covariates": covariates}
        return type("Lactase", (Hospital,), own)

    def plink(self, trait, *options, program="plink1.9"):
        """Run PLINK on the pooled file."""
        path = self.folder / f"{trait}.txt"
        values = self.traits[trait] + (trait != "level")
        path.write_text(
            "".join(f"{n} {n} {v:g}\n" for n, v in zip(self.people, values, strict=True))
        )
        covariates = self.folder / "covariates.txt"
        head = ["FID", "IID", "age", *(f"site{site}" for site in range(1, SITES))]
        lines = [" ".join(head)]
        for name, age, own in zip(self.people, self.age, self.site, strict=True):
            indicators = " ".join(str(int(own == site)) for site in range(1, SITES))
            lines.append(f"{name} {name} {age:g} {indicators}")
        covariates.write_text("\n".join(lines) + "\n")
        options = [covariates if option == "COVAR" else option for option in options]
        files = ("--bfile", self.source, "--pheno", path, "--out", self.folder / "plink")
        order = ("--keep-allele-order", "--allow-no-sex") if program == "plink1.9" else ()
        call(program, *files, *order, *options)

    def tables(self, variant, trait):
        """Return each hospital's people by status (cases first) and copies of A1."""
        copies = self.copies[:, self.names.index(variant)]
        status = self.traits[trait]
        return [
            np.array(
                [
                    [((copies == g) & (status == c) & (self.site == site)).sum() for g in range(3)]
                    for c in (1, 0)
                ],
                float,
            )
            for site in range(SITES)
        ]

    def design(self, variant):
        """Return hospitals, age and copies of A1 of the people with a genotype, and who has."""
        copies = self.copies[:, self.names.index(variant)]
        known = np.isfinite(copies)
        columns = [np.eye(SITES)[self.site], self.age[:, None], copies[:, None]]
        return np.hstack(columns)[known], known


def rank(lines, name=HIT):
    ps = {key: float(line["p"]) for key, line in lines.items()}
    place = sorted(ps, key=lambda key: ps[key] if ps[key] == ps[key] else 2).index(name)
    print(f"  {name} is number {place + 1} of {len(lines)}, p = {ps[name]:.3g}")
    return f"{place + 1} of {len(lines)}"


def compare_counts(data):
    """Return the table's rows of the allelic test and of the trend test."""
    trait = "persistence"
    data.plink(trait, "--mh", "--within", data.clusters)
    printed = table(data.folder / "plink.cmh")
    lines = study(data.client(trait), data.folder / "allelic", test="allelic")
    print("\nallelic test, generated trait, against plink1.9 --mh with the hospitals as clusters")
    exact = {key: [] for key in ("statistic", "p", "effect", "se", "low", "high")}
    for name, line in lines.items():
        people = data.tables(name, trait)
        assert int(line["people"]) == sum(part.sum() for part in people), name
        alleles = [np.column_stack([part @ [0, 1, 2], part @ [2, 1, 0]]) for part in people]
        if not sum(alleles).all():
            continue
        expected = StratifiedTable(alleles)
        test = expected.test_null_odds(correction=False)
        low, high = expected.oddsratio_pooled_confint()
        # Its p-value is 1 less a probability, which is 0 where p is small.
        p = stats.chi2.sf(test.statistic, 1)
        theirs = [test.statistic, p, expected.oddsratio_pooled]
        theirs += [expected.logodds_pooled_se, low, high]
        for key, value in zip(exact, theirs, strict=True):
            exact[key].append((float(line[key]), value))
    found = {
        key: show(f"{key}, from statsmodels' StratifiedTable", pairs)
        for key, pairs in exact.items()
    }
    interval = [pair for key in ("low", "high") for pair in exact[key]]
    found["interval"] = show("interval, from statsmodels' StratifiedTable", interval)
    for ours, theirs in (
        *(("statistic", "CHISQ"), ("p", "P"), ("effect", "OR")),
        *(("se", "SE"), ("low", "L95"), ("high", "U95")),
    ):
        pairs = [(float(lines[n][ours]), number(row[theirs])) for n, row in printed.items()]
        found[theirs] = show(f"{ours}, as PLINK 1.9 prints it", pairs)
    what = "allelic, against statsmodels' `StratifiedTable` and `plink --mh`"
    differences = [found[key] for key in ("p", "effect", "interval", "P", "OR")]
    allelic = [what, *differences, rank(lines)]
    lines = study(data.client(trait), data.folder / "trend", test="trend")
    print("\ntrend test, generated trait, against numpy on the people of each hospital")
    exact = {"p": [], "statistic": []}
    for name, line in lines.items():
        excess = variance = 0.0
        for part in data.tables(name, trait):
            copies = np.repeat([0, 1, 2, 0, 1, 2], part.ravel().astype(int))
            status = np.repeat([1, 0], part.sum(1).astype(int))
            excess += (status * (copies - copies.mean())).sum()
            variance += status.var() * len(status) * copies.var(ddof=1)
        if variance:
            exact["statistic"].append((float(line["statistic"]), excess**2 / variance))
            exact["p"].append((float(line["p"]), stats.chi2.sf(excess**2 / variance, 1)))
    found = {key: show(f"{key}, from numpy and scipy", pairs) for key, pairs in exact.items()}
    what = "trend, against numpy on the people of each hospital"
    return [allelic, [what, found["p"], "", "", "", "", rank(lines)]]


def compare_null(data):
    """Return rows: inflation and hits of traits that no variant influences."""
    north, south = PREVALENCES
    print(f"{NULL_TRAITS} traits without an effect; cases: {north:g} in the north, {south:g} else")
    found = {}
    for index in range(NULL_TRAITS):
        trait = f"null{index}"
        default = study(data.client(trait), data.folder / f"{trait}-default")
        allelic = study(data.client(trait), data.folder / f"{trait}-allelic", test="allelic")
        ps = {
            "default (`trend`)": [float(line["p"]) for line in default.values()],
            "`allelic`": [float(line["p"]) for line in allelic.values()],
        }
        for what, options, end in (
            ("`plink --mh`, hospitals as clusters", ("--mh", "--within", data.clusters), "cmh"),
            ("`plink --assoc`, hospitals ignored", ("--assoc",), "assoc"),
        ):
            data.plink(trait, *options)
            rows = table(data.folder / f"plink.{end}").values()
            ps[what] = [number(row["P"]) for row in rows]
        for what, values in ps.items():
            known = np.array(values)[np.isfinite(values)]
            inflation = stats.chi2.isf(np.median(known), 1) / stats.chi2.median(1)
            found.setdefault(what, []).append([inflation, (known < 1e-3).sum(), known.min()])
    rows = []
    for what, values in found.items():
        inflation, hits, least = np.array(values).T
        rows.append(
            [
                *(what, f"{np.median(inflation):.2f}", f"{inflation.mean():.2f}"),
                *(f"{hits.mean():.1f} of {len(data.names)}", f"{(hits > 0).sum()} of {len(hits)}"),
                short(f"{least.min():.1e}"),
            ]
        )
    print(f"  by chance {len(data.names) * 1e-3:.2f} of {len(data.names)} are below 1e-3\n")
    return rows


def compare_models(data, plink2):
    """Return the table's rows of the logistic and of the linear test."""
    rows = []
    for test, trait, end in (
        ("logistic", "persistence", "assoc.logistic"),
        ("linear", "level", "assoc.linear"),
    ):
        lines = study(data.client(trait, ("age",)), data.folder / test, test=test)
        data.plink(trait, f"--{test}", "hide-covar", "--covar", "COVAR")
        printed = table(data.folder / f"plink.{end}", ("TEST", "ADD"))
        print(f"\n{test}, generated trait, age and hospitals, against plink1.9 --{test} --covar")
        found = {"effect": [], "se": [], "p": []}
        for name, line in lines.items():
            design, known = data.design(name)
            if not design[:, -1].std():
                continue
            outcome = data.traits[trait][known]
            if test == "logistic":
                try:
                    fit = sm.Logit(outcome, design).fit(disp=0, method="newton", tol=1e-12)
                except (np.linalg.LinAlgError, sm.tools.sm_exceptions.PerfectSeparationError):
                    continue
            else:
                fit = sm.OLS(outcome, design).fit()
            effect = np.exp(fit.params[-1]) if test == "logistic" else fit.params[-1]
            if test == "linear" or fit.mle_retvals["converged"]:
                found["effect"].append((float(line["effect"]), effect))
                found["se"].append((float(line["se"]), fit.bse[-1]))
                found["p"].append((float(line["p"]), fit.pvalues[-1]))
        exact = {
            key: show(f"{key}, from statsmodels on the pooled people", pairs)
            for key, pairs in found.items()
        }
        theirs = "OR" if test == "logistic" else "BETA"
        for ours, key in (("effect", theirs), ("statistic", "STAT"), ("p", "P")):
            shared = [(line, printed[n]) for n, line in lines.items() if n in printed]
            pairs = [(float(line[ours]), number(row[key])) for line, row in shared]
            exact[key] = show(f"{ours}, as PLINK 1.9 prints it", pairs)
        what = f"{test}, against statsmodels with an indicator a hospital"
        differences = [exact["p"], exact["effect"], "", exact["P"], exact[theirs]]
        rows.append([what, *differences, rank(lines)])
        if plink2:
            extra = ("no-firth",) if test == "logistic" else ()
            options = ("--glm", "hide-covar", *extra, "cols=+a1freq,+orbeta,+se,+tz,+p")
            data.plink(trait, *options, "--covar", "COVAR", program=plink2)
            end = "logistic" if test == "logistic" else "linear"
            printed = table(data.folder / f"plink.PHENO1.glm.{end}", ("TEST", "ADD"))
            shared = [(line, printed[n]) for n, line in lines.items() if n in printed]
            pairs = [(float(line["p"]), number(row["P"])) for line, row in shared]
            show("p, as PLINK 2 prints it", pairs)
    return rows


def compare_swapped(folder, source):
    """Split as PLINK does by itself: A1 is each population's rarer allele."""
    data = Lactase(folder, source, ())
    lines = study(data.client("persistence"), folder / "allelic", test="allelic")
    data.plink("persistence", "--mh", "--within", data.clusters)
    printed = table(folder / "plink.cmh")
    whole = {name: line for name, line in lines.items() if line["sites"] == "5"}
    print("\nallelic test, the hospitals' files with A1 their own rarer allele")
    pairs = [(float(line["p"]), number(printed[n]["P"])) for n, line in whole.items()]
    show("p, as PLINK 1.9 prints it", pairs)
    left = {name: line for name, line in lines.items() if "strand" in line["note"]}
    print(
        f"  {len(left)} of {len(lines)} variants were left out at a hospital: A/T or C/G, swapped"
    )


def against_plink(options):
    named = os.environ.get("FEDMED_DATA")
    source = Path(named or "").expanduser() / "genotypes-lct" / "LCT"
    if shutil.which("plink1.9") is None or not source.with_suffix(".bed").is_file():
        print("not compared with PLINK: plink1.9 or FEDMED_DATA/genotypes-lct is missing")
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Lactase(Path(folder), source)
        rows = compare_counts(data) + compare_models(data, options.plink2)
        print()
        head = ["", "p", "effect", "interval", "p as PLINK 1.9 prints it"]
        head += ["effect as PLINK 1.9 prints it", f"place of {HIT}"]
        versions = ["numpy", "scipy", "statsmodels"]
        documented.show("gwas", head, rows, options, versions=versions)
        head = ["", "λ, median of the traits", "λ, mean", "p < 1e-3, mean"]
        head += ["traits with one", "least p"]
        documented.show("gwas-null", head, compare_null(data), options, versions=versions)
    with tempfile.TemporaryDirectory() as folder:
        compare_swapped(Path(folder), source)


def generate(folder, variants, people):
    """Write five filesets of unrelated variants."""
    generator = np.random.default_rng(0)
    width = (people + 3) // 4
    pad = np.uint8((1 << 2 * ((people - 1) % 4 + 1)) - 1)
    # Two random bits a genotype; PLINK's code of one copy is 10, and 01 would be a missing one.
    shift = np.arange(4) * 2
    pairs = (np.arange(256)[:, None] >> shift) & 3
    code = (np.where(pairs == 1, 2, pairs) << shift).sum(1).astype(np.uint8)
    for site in range(SITES):
        with (folder / f"site{site}.bed").open("wb") as file:
            file.write(b"\x6c\x1b\x01")
            for start in range(0, variants, 10_000):
                count = min(10_000, variants - start)
                bits = generator.integers(0, 256, (count, width), np.uint8)
                bits[::2] |= generator.integers(0, 256, bits[::2].shape, np.uint8)
                packed = code[bits]
                packed[:, -1] &= pad
                file.write(packed.tobytes())
        (folder / f"site{site}.fam").write_text(
            "".join(f"p{n} p{n} 0 0 0 -9\n" for n in range(people))
        )
        each = -(-variants // 22)
        with (folder / f"site{site}.bim").open("w") as file:
            file.writelines(
                f"{1 + n // each}\trs{n}\t0\t{1000 + 5000 * (n % each)}\tA\tG\n"
                for n in range(variants)
            )


def measure(folder, test, people):
    """Run one study and print its time and memory; alone in its process."""
    rows = [
        [{"patient": f"p{n}", "phenotype": (n + site) % 2} for n in range(people)]
        for site in range(SITES)
    ]
    client = type("Generated", (Hospital,), {"folder": folder, "rows": rows})
    before, began = peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        server = ServerApp()

        @server.main()
        def main(grid, context):
            associate(grid, context)

        config = {"run-dir": f"{out}/run", "test": test}
        run_local(server, client.client_app(), SITES, run_config=config)
        seconds = time.perf_counter() - began
        with Path(out, "run", "association.csv").open(newline="") as file:
            lines = sum(1 for _ in file) - 1
        inflation = json.loads(Path(out, "run", "summary.json").read_text())["association"]
    print(json.dumps([seconds, before, peak(), lines, inflation["lambda-gc"]]))


def peak():
    """Return the most memory that this process has had, in MB."""
    # Of this process alone: what getrusage tells begins with the parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def speed(options):
    variants, people = options.variants, options.people
    print(f"\n{SITES} hospitals with {people} people each, from disk, one process, all with report")
    print(f"  {'variants':>10} {'test':>9} {'seconds':>9} {'peak MB':>9} {'above start':>12}")
    rows = []
    for count in (variants // 5, variants):
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder), count, people)
            for test in ("allelic", "trend"):
                command = [sys.executable, __file__, "--measure", folder, "--test", test]
                done = subprocess.run(
                    [*command, "--people", str(people)], capture_output=True, text=True
                )
                if done.returncode:
                    raise SystemExit(done.stderr[-2000:])
                found = json.loads(done.stdout.splitlines()[-1])
                seconds, before, most, lines, inflation = found
                assert lines == count
                print(
                    f"  {count:>10,} {test:>9} {seconds:>9.1f} {most:>9.0f} {most - before:>12.0f}"
                    f"   lambda {inflation:.3f}",
                    flush=True,
                )
                rows.append([f"{count:,}", test, f"{most:.0f}", f"{most - before:.0f}"])
    print()
    head = ["variants", "test", "peak memory, MB", "above that at the start, MB"]
    documented.show("gwas-memory", head, rows, options, versions=["numpy", "flwr"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", type=int, default=500_000, help="0: no times")
    parser.add_argument("--people", type=int, default=500)
    parser.add_argument("--plink2", default=shutil.which("plink2"), help="path of plink2")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--test", default="trend", help=argparse.SUPPRESS)
    documented.add_options(parser)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.test, options.people)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    against_plink(options)
    if options.variants:
        speed(options)


if __name__ == "__main__":
    main()
