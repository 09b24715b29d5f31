import json

import numpy as np
import pandas as pd
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from studies import World, study
from surveys import surveyed
from tables import SCHEMA, patients
from tiny import TinyClient, ask, context_of, fixed, make_rows, run_tiny

from fedmed_flower import MedicalClient, SiteData
from fedmed_flower.data.schema import table_of
from fedmed_flower.server.duplicates import Namesakes
from fedmed_flower.statistics.request import Request

TEXT = (
    "patient ids that are at more than one hospital ({}): {}. If they are the same people, each is "
    "counted once per hospital"
)
MORE = ", may be tested on after training elsewhere, and has the privacy cost of all of them"


class Moving(TinyClient):
    """Two patients of the first hospital's training are tested on at the third."""

    def load_data(self, site):
        test = make_rows(8, (site.index, 2), f"{site.name}-test")
        if site.index == 2:
            test += make_rows(2, 9, "hospital-1-train")
        return SiteData(train=make_rows(10, site.index, f"{site.name}-train"), test=test)


def warned(folder):
    lines = (folder / "log.txt").read_text(encoding="utf-8").splitlines()
    return [line.partition("WARNING ")[2] for line in lines if "patient ids" in line]


def test_a_run_names_the_hospitals_whose_patients_are_called_alike_and_goes_on(tmp_path):
    run_tiny(tmp_path / "run", Moving, 3)
    assert warned(tmp_path / "run") == [TEXT.format("hospital-1, hospital-3", 2) + MORE]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["status"], summary["failures"], len(summary["sites"])) == ("finished", [], 3)
    run_tiny(tmp_path / "other", TinyClient, 3)
    assert warned(tmp_path / "other") == []


class Everywhere(MedicalClient):
    def load_data(self, site):
        return SiteData(train=patients(60, site.index))


def test_statistics_and_association_studies_say_so_too(tmp_path):
    surveyed(Everywhere, Request(columns=("age",)), tmp_path / "survey", sites=7)
    where = "hospital-1, hospital-2, hospital-3, hospital-4, hospital-5, ..."
    assert warned(tmp_path / "survey") == [TEXT.format(where, 60)]
    world = World(tmp_path)
    study(world.client(), tmp_path, test="trend")
    shared = sorted(map(len, world.phenotypes))[-2]
    where = "hospital-1, hospital-2, hospital-3"
    assert warned(tmp_path / "run") == [TEXT.format(where, shared)]


@pytest.mark.parametrize("patient", [np.array("p1"), np.array(3), 3, ("ward", "h-3"), b"p1"])
def test_patients_of_other_kinds_are_no_names(tmp_path, patient):
    rows = [row | {"patient": patient} for row in make_rows(4, 0)]
    client = fixed(SiteData(train=rows, test=make_rows(4, 1, "q")))
    run_tiny(tmp_path / "run", client, 2)
    assert warned(tmp_path / "run") == [TEXT.format("hospital-1, hospital-2", 4) + MORE]


def test_the_lines_of_tables_that_name_no_patients_are_no_names(tmp_path):
    rows = patients(60, 1)
    frame = [{name: row[name] for name in row if name != "patient"} for row in rows]

    class Nameless(MedicalClient):
        def load_data(self, site):
            return SiteData(train=table_of(pd.DataFrame(frame), SCHEMA, "a table").rows)

    surveyed(Nameless, Request(columns=("age",)), tmp_path / "survey", sites=2)
    assert warned(tmp_path / "survey") == []


def digests(context):
    reply = ask(Moving, "query.describe", context)
    return reply.content.config_records.get("patients")


def test_a_real_hospital_tells_nothing_of_names(tmp_path):
    real = {"site-name": "north", "data-dir": str(tmp_path), "partition-id": 0}
    assert digests(context_of(node_config=real)) is None
    simulated = [digests(context_of(run_id=run_id))["digests"] for run_id in (1, 1, 2)]
    assert simulated[0] == simulated[1]
    assert len(simulated[0]) == 8 * 18
    # Digests of two runs cannot be compared.
    assert not np.isin(*(np.frombuffer(told, "<u8") for told in simulated[1:])).any()


@pytest.mark.parametrize(
    "record", [{}, {"digests": b"123"}, {"digests": "12345678"}, {"digests": 8}, {"digests": b""}]
)
def test_what_cannot_be_read_is_passed_over(record):
    found, names = Namesakes(), {1: "a", 2: "b", 3: "c"}
    for node, own in ((1, {"digests": b"12345678"}), (2, record), (3, {"digests": b"12345678"})):
        content = RecordDict({"patients": ConfigRecord(own), "arrays": ArrayRecord()})
        found.take(node, content)
    assert found.text(names) == TEXT.format("a, c", 1)
    assert found.text({1: "a", 2: "b"}) == ""
    assert Namesakes().text(names) == ""
