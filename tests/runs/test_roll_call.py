import io
import json
import struct
import zlib
from dataclasses import replace

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image
from tables import holding, predicting, run_tables
from tiny import TinyClient, fixed, make_rows, model_arrays, nodes_of, run_tiny, says

from fedmed_flower import SiteData
from fedmed_flower.data.pictures import sound
from fedmed_flower.errors import InputError
from fedmed_flower.runs.roll_call import (
    call_newcomers,
    collect_contributions,
    collect_personal,
    collect_pictures,
    roll_call,
)
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.wire import MESSAGE_VERSION, Sent


class Answers:
    """A grid whose nodes 1, 2, ... give these answers, and which remembers what was asked."""

    def __init__(self, *answers):
        self.answers, self.sent = dict(enumerate(answers, start=1)), []
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def get_node_ids(self):
        return list(self.answers)

    in_process = True

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(len(self.sent))
            self.sent.append(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        replies = []
        for message in (self.sent[int(each)] for each in message_ids):
            content = self.answers[message.metadata.dst_node_id]
            if content is not None:
                replies.append(Message(content, reply_to=message))
        return replies


def about(name="north", **counts):
    counts = {"num-examples": 4, "train": 4, "val": 2, "test": 3} | counts
    site = {"name": name, "data": "files", "generated": False, "simulated": True}
    site["version"] = MESSAGE_VERSION
    return RecordDict({"metrics": MetricRecord(counts), "site": ConfigRecord(site)})


def failure(reason):
    return Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)


def test_the_roll_call_takes_up_what_sites_say():
    other = about("south", **{"rejected": 5, "labels": [1, 3]})
    other["site"]["simulated"], other["site"]["generated"] = False, True
    other["site"]["data"] = "more files"
    sites = roll_call(Answers(other, about(), failure("site west: OSError"), None), 9)
    assert sites.nodes == {1, 2, 3, 4}
    # In the order of their names.
    assert list(sites.counts) == [2, 1]
    assert sites.counts[1] == {"train": 4, "val": 2, "test": 3}
    assert sites.names == {1: "south", 2: "north", 3: "west"}
    assert sites.labels == {1: [1, 3], 2: None}
    assert sites.rejected == {1: 5}
    assert sites.rows()["south"] == {"train": 4, "val": 2, "test": 3, "rejected": 5}
    assert sites.rows()["north"] == {"train": 4, "val": 2, "test": 3}
    assert sites.sources == {"files", "more files"}
    assert (sites.generated, sites.simulated) == (True, False)
    assert sites.refusals == {3: "OSError", 4: "no answer within 9 s"}
    assert sites.refused() == {"OSError": ["west"], "no answer within 9 s": ["node 4"]}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"train": -1},
            "negative number of rows in {'train': -1, 'val': 2, 'test': 3}, 0 rejected",
        ),
        ({"rejected": -7}, "negative number of rows in {'train': 4, 'val': 2, 'test': 3}, -7"),
        ({"rejected": [1]}, "TypeError"),
        ({"val": float("inf")}, "OverflowError"),
        ({"test": float("nan")}, "cannot convert float NaN to integer"),
        ({"train": [4, 4]}, "TypeError"),
    ],
)
def test_a_malformed_answer_to_the_roll_call_is_a_refusal(change, text):
    sites = roll_call(Answers(about("bad", **change), about()), 9)
    assert set(sites.counts) == {2}
    (refusal,) = sites.refusals.values()
    assert refusal.startswith("malformed answer: ")
    assert text in refusal
    with pytest.raises(InputError, match=says(refusal)):
        roll_call(Answers(about("bad", **change)), 9)


@pytest.mark.parametrize("columns", [[1, 3], "age", 3])
def test_columns_that_are_no_names_are_a_refusal(columns):
    bad = about("bad")
    bad["empty"] = ConfigRecord({"columns": columns})
    sites = roll_call(Answers(bad, about()), 9)
    assert sites.refusals == {
        1: "malformed answer: the columns in its record 'empty' are not a list of names"
    }
    assert sites.empty == {}


def test_a_hospital_whose_messages_have_another_version_is_refused_by_name():
    older = about("west")
    del older["site"]["version"]
    later = about("east")
    later["site"]["version"] = 7
    strange = about("south")
    strange["site"]["version"] = "1\n"
    sites = roll_call(Answers(older, later, strange, about()), 9)
    assert set(sites.counts) == {4}
    end = ", and those of the server version 2: install the same fedmed-flower at both"
    assert sites.refusals == {
        1: "west: messages of the hospital have no version, as before versions were named" + end,
        2: "east: messages of the hospital have version 7" + end,
        3: "south: messages of the hospital have version 1 " + end,
    }
    with pytest.raises(InputError, match=says(sites.refusals[1])):
        roll_call(Answers(older), 9)


def test_the_roll_call_names_the_version_of_the_messages():
    grid = Answers(about())
    roll_call(grid, 9)
    assert grid.sent[0].content["config"] == ConfigRecord({"version": MESSAGE_VERSION})


def test_a_run_with_a_hospital_of_another_version_goes_on_without_it(tmp_path):
    class Older(TinyClient):
        """The second hospital's package is of before messages had versions."""

    def forget(message, context, call):
        reply = call(message, context)
        if context.node_config["partition-id"] and reply.has_content():
            del reply.content["site"]["version"]
        return reply

    run_tiny(tmp_path / "run", Older, mods=[forget], num_server_rounds=1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (reason,) = summary["refused"]
    assert reason.startswith("hospital-2: messages of the hospital have no version")
    assert list(summary["test"]["sites"]) == ["hospital-1"]


def test_nobody_answers():
    for grid in (Answers(), Answers(None)):
        with pytest.raises(InputError, match=says("no site answered the roll call")):
            roll_call(grid, 9)


def png(grey=0, size=8):
    file = io.BytesIO()
    Image.new("L", (size, size), grey).save(file, "PNG")
    return file.getvalue()


def drawn(titles, images):
    return RecordDict({"pictures": ConfigRecord({"titles": titles, "images": images})})


def collect(tmp_path, *answers, count=2):
    """Return what is found, and what the folder holds."""
    grid = Answers(*answers)
    names = {number: f"site {number}" for number in grid.get_node_ids()}
    config = ConfigRecord({"run-key": "k"})
    found = collect_pictures(
        grid, model_arrays(), config, count, 9, names, Sent(), RunFolder(tmp_path / "run")
    )
    files = {p.name: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    return found, files


def test_pictures_are_numbered_in_the_order_of_the_sites(tmp_path):
    pictures = [drawn([f"{n}a", f"{n}b"], [png(n), png(10 * n)]) for n in (1, 2)]
    found, files = collect(tmp_path, *pictures)
    assert found == [
        {"site": "site 1", "file": "pictures/1.png", "title": "1a"},
        {"site": "site 1", "file": "pictures/2.png", "title": "1b"},
        {"site": "site 2", "file": "pictures/3.png", "title": "2a"},
        {"site": "site 2", "file": "pictures/4.png", "title": "2b"},
    ]
    assert files == {"1.png": png(1), "2.png": png(10), "3.png": png(2), "4.png": png(20)}


def test_each_known_site_is_asked_once_with_the_model_and_the_count(tmp_path):
    grid, arrays = Answers(drawn([], []), drawn([], []), drawn([], [])), model_arrays()
    config = ConfigRecord({"run-key": "k", "frozen-digest": "f"})
    sent, names = Sent(), {1: "a", 3: "c"}
    found = collect_pictures(grid, arrays, config, 5, 9, names, sent, RunFolder(tmp_path))
    assert found == []
    # Of nobody a picture came.
    assert sent.keys == {}
    assert [m.metadata.dst_node_id for m in grid.sent] == [1, 3]
    for message in grid.sent:
        assert message.metadata.message_type == "query.pictures"
        assert dict(message.content["config"]) == {
            "run-key": "k", "frozen-digest": "f", "count": 5,
        }  # fmt: skip
        assert message.content["arrays"] is arrays
    # The config of the run stays as it was.
    assert "count" not in config


def bomb():
    """A small file that says it has as many pixels as a thousand screens."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


HTML = b"<script>alert(1)</script>"
MALFORMED = "no pictures of site 2: malformed answer: "
ABSENT = "malformed answer: KeyError 'contribution'"
NO_RECORD = "malformed answer: it has 0 metric records instead of one"
LACKING = "malformed answer: it has no personal-epochs"
NO_IMAGES = MALFORMED + "KeyError 'images'"
TYPES = "TypeError titles must be texts and images bytes"
LISTS = "TypeError titles and images must be lists"
UNSOUND = "a picture of site 2 is not shown: "
BOMB = "it has 60000 x 60000 pixels, more than 1024 x 1024 or none"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (drawn(["t"], [HTML]), UNSOUND + "it is not a PNG"),
        (drawn(["t"], [png() + HTML]), UNSOUND + "25 bytes follow its end"),
        (drawn(["t"], [bytes(10**6)]), UNSOUND + "it has 1,000,000 bytes, more than 512,000"),
        (drawn(["t"], [bomb()]), UNSOUND + BOMB),
        (drawn(["t"], [b""]), UNSOUND + "it is not a PNG"),
        # Made into bytes these numbers would fill the memory.
        (drawn(["t"], [2**62]), MALFORMED + TYPES),
        (drawn(["t"], [-1]), MALFORMED + TYPES),
        (drawn(["t"], ["text"]), MALFORMED + TYPES),
        (drawn([1.5], [png()]), MALFORMED + TYPES),
        (drawn(["t"], 2**62), MALFORMED + LISTS),
        (drawn("t", png()), MALFORMED + LISTS),
        (drawn(["t", "u"], [png()]), MALFORMED + "2 titles of 1 pictures"),
        (RecordDict({"pictures": ConfigRecord({"titles": ["t"]})}), NO_IMAGES),
        (RecordDict({"images": ConfigRecord()}), MALFORMED + "KeyError 'pictures'"),
        (RecordDict({"pictures": MetricRecord({"images": 1})}), MALFORMED + "KeyError 'pictures'"),
        (RecordDict({"pictures": ArrayRecord({})}), MALFORMED + "KeyError 'pictures'"),
        (RecordDict(), MALFORMED + "KeyError 'pictures'"),
        (failure("site south: declined: not today"), "no pictures of site 2: declined: not today"),
        (failure(""), f"no pictures of site 2: error {int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)}"),
    ],
)  # fmt: skip
def test_what_a_hostile_site_answers_harms_nobody(answer, text, tmp_path, caplog):
    good = drawn(["case"], [png(3)])
    found, files = collect(tmp_path, good, answer, good)
    assert [entry["site"] for entry in found] == ["site 1", "site 3"]
    assert files == {"1.png": png(3), "2.png": png(3)}
    assert caplog.messages == [text]


def test_a_site_that_does_not_answer_has_no_pictures(tmp_path):
    found, files = collect(tmp_path, None, drawn(["case"], [png()]))
    assert [entry["site"] for entry in found] == ["site 2"]
    assert set(files) == {"1.png"}


def test_no_site_has_more_pictures_than_it_was_asked_for(tmp_path):
    many = drawn([f"{n}" for n in range(500)], [png(n % 256) for n in range(500)])
    found, files = collect(tmp_path, many, drawn(["case"], [png()]), count=2)
    # Two cases and the worst.
    assert [entry["title"] for entry in found] == ["0", "1", "2", "case"]
    assert len(files) == 4


def test_long_titles_are_cut(tmp_path):
    found, _ = collect(tmp_path, drawn(["x" * 10**5], [png()]))
    assert found[0]["title"] == "x" * 120


def picturing(answer=None):
    """Return a client whose second site answers so when it is asked for pictures."""
    good, asked = TinyClient.client_app(), []

    class Client:
        @staticmethod
        def client_app():
            def handle(message, context):
                if message.metadata.message_type == "query.pictures":
                    index = context.node_config["partition-id"]
                    asked.append((index, message.content["config"]["count"]))
                    if answer is not None and index == 1:
                        return answer(message)
                return good(message, context)

            return handle

    return Client, asked


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_run_ends_with_pictures_of_each_site(tmp_path):
    client, asked = picturing()
    run_tiny(tmp_path, client, num_sites=3, pictures=2, num_server_rounds=1)
    assert asked == [(0, 2), (1, 2), (2, 2)]
    pictures = summary_of(tmp_path)["pictures"]
    by_site = [entry["site"] for entry in pictures]
    for site in ("hospital-1", "hospital-2", "hospital-3"):
        # Two cases, and the worst where it is none of them.
        assert by_site.count(site) in (2, 3)
    assert [entry["file"] for entry in pictures] == [
        f"pictures/{n}.png" for n in range(1, len(pictures) + 1)
    ]
    page = (tmp_path / "report.html").read_text()
    assert "Test cases" in page
    assert page.count("data:image/png;base64,") == len(pictures)
    for entry in pictures:
        assert sound((tmp_path / entry["file"]).read_bytes()) is None
        # The patients' names stay at the hospital.
        assert "test" not in entry["title"]
        assert entry["title"] in page
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        entry["file"].removeprefix("pictures/") for entry in pictures
    }


def test_a_run_without_pictures_asks_nobody(tmp_path):
    client, asked = picturing()
    run_tiny(tmp_path, client, pictures=0, num_server_rounds=1)
    assert asked == []
    assert summary_of(tmp_path)["pictures"] == []
    assert not (tmp_path / "pictures").exists()
    assert "Test cases" not in (tmp_path / "report.html").read_text()


def reply_with(content):
    return lambda message: Message(content(), reply_to=message)


def raises(message):
    raise MemoryError("of the site")


@pytest.mark.parametrize(
    "answer",
    [
        reply_with(lambda: drawn([HTML.decode()], [HTML])),
        reply_with(lambda: drawn(["t"], [2**62])),
        reply_with(RecordDict),
        reply_with(lambda: failure("site hospital-2: OSError")),
        lambda message: None,
        raises,
    ],
)
def test_a_hostile_site_does_not_keep_a_run_from_its_end(answer, tmp_path):
    client, _ = picturing(answer)
    run_tiny(tmp_path, client, num_sites=3, pictures=1, num_server_rounds=1)
    summary = summary_of(tmp_path)
    assert summary["status"] == "finished"
    assert {entry["site"] for entry in summary["pictures"]} == {"hospital-1", "hospital-3"}
    page = (tmp_path / "report.html").read_text()
    assert "keeps its pictures to itself" in page
    assert HTML.decode() not in page


def test_html_in_a_title_is_shown_as_text(tmp_path):
    client, _ = picturing(reply_with(lambda: drawn([HTML.decode()], [png()])))
    run_tiny(tmp_path, client, pictures=1, num_server_rounds=1)
    titles = [entry["title"] for entry in summary_of(tmp_path)["pictures"]]
    assert HTML.decode() in titles
    page = (tmp_path / "report.html").read_text()
    assert HTML.decode() not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_real_site_shares_nothing_unless_it_says_so(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    north, south, west, east = nodes_of(tmp_path, "north", "south", "west", "east")
    budget = {"budget-epsilon": 9.0, "budget-delta": 1e-5}
    node_configs = [
        north | {"output-dir": str(own)},
        south,
        west | {"share-images": True},
        east | {"share-images": True} | budget,
    ]
    folder = tmp_path / "run"
    run_tiny(folder, num_sites=4, node_configs=node_configs, pictures=2, num_server_rounds=1)
    pictures = summary_of(folder)["pictures"]
    assert {entry["site"] for entry in pictures} == {"west"}
    (run,) = own.iterdir()
    kept = sorted((run / "pictures-kept" / "north").iterdir())
    assert len(kept) in (2, 3)
    assert kept[0].name.startswith("1-")
    assert sound(kept[0].read_bytes()) is None
    log = (folder / "log.txt").read_text()
    assert "south: no pictures: they may not leave, and output-dir is not set" in log


def test_pictures_change_nothing(tmp_path):
    with_pictures = run_tiny(tmp_path / "a", pictures=2, num_server_rounds=1)
    without = run_tiny(tmp_path / "b", pictures=0, num_server_rounds=1)
    assert {k: v.numpy().tobytes() for k, v in with_pictures.arrays.items()} == {
        k: v.numpy().tobytes() for k, v in without.arrays.items()
    }
    assert summary_of(tmp_path / "a")["test"] == summary_of(tmp_path / "b")["test"]


def test_a_site_without_test_rows_has_no_pictures(tmp_path):
    run_tiny(tmp_path, fixed(SiteData(train=make_rows(4, 0))), pictures=2, num_server_rounds=1)
    assert summary_of(tmp_path)["pictures"] == []
    assert "no pictures of" not in (tmp_path / "log.txt").read_text()


def test_sites_that_cannot_take_part_are_named_by_their_reason():
    wrong, odd = failure("site south: no rows"), RecordDict({"metrics": MetricRecord()})
    sites = roll_call(Answers(about(), wrong, failure("site west: no rows"), odd), 9)
    assert sites.refused() == {
        "no rows": ["south", "west"],
        "malformed answer: KeyError 'site'": ["node 4"],
    }


def told(**columns):
    return RecordDict({"contribution": ConfigRecord(columns)})


NAMED = {1: "north", 2: "south", 3: "west"}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (failure("site south: declined: not today"), "declined: not today"),
        (failure(""), f"error {int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)}"),
        (RecordDict(), ABSENT),
        (RecordDict({"other": ConfigRecord({"n": [1.0]})}), ABSENT),
        (RecordDict({"contribution": MetricRecord({"n": 1.0})}), ABSENT),
        (RecordDict({"contribution": ArrayRecord({})}), ABSENT),
        (None, "no answer within 9 s"),
    ],
)
def test_who_tells_nothing_before_the_first_round_is_named(answer, text, caplog):
    grid = Answers(told(n=[1.0, 2.0]), answer, told(n=[3.0]), told(n=[4.0]))
    # The fourth could not take part, and is not asked.
    sent = Sent()
    found = collect_contributions(grid, 9, NAMED, sent)
    assert {s: keys for s, keys in sent.keys["contribution"].items() if s != "south"} == {
        "north": {"contribution.n"}, "west": {"contribution.n"},
    }  # fmt: skip
    assert found == {"north": {"n": [1.0, 2.0]}, "west": {"n": [3.0]}}
    assert caplog.messages == [f"south sent nothing to prepare the model with: {text}"]
    assert [message.metadata.dst_node_id for message in grid.sent] == [1, 2, 3]
    assert {m.metadata.message_type for m in grid.sent} == {"query.contribution"}


def personal(**figures):
    usual = {"auc": 0.5, "val-global": 0.4, "val-own": 0.6, "personal-epochs": 2}
    return RecordDict({"metrics": MetricRecord(usual | figures)})


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (failure("site south: declined: not today"), "declined: not today"),
        (RecordDict(), "malformed answer: it has 0 metric records instead of one"),
        (
            RecordDict({"a": MetricRecord({"auc": 1.0}), "b": MetricRecord({"auc": 1.0})}),
            "malformed answer: it has 2 metric records instead of one",
        ),
        (RecordDict({"metrics": MetricRecord({"auc": 1.0})}), LACKING),
        (RecordDict({"metrics": ConfigRecord({"auc": "high"})}), NO_RECORD),
        (personal(auc=float("nan")), "malformed answer: auc is not finite"),
        (personal(**{"val-own": float("inf")}), "malformed answer: val-own is not finite"),
        (personal(**{"val-own": [0.5]}), "malformed answer: it has no val-own"),
        (
            personal(odd=10**400),
            "malformed answer: OverflowError int too large to convert to float",
        ),
        (
            personal(**{"personal-epochs": 0.5}),
            "malformed answer: personal-epochs must be a whole number, at least 0, got 0.5",
        ),
        (
            personal(**{"num-examples": -4}),
            "malformed answer: num-examples must be a whole number, at least 0, got -4.0",
        ),
        (None, "no answer within 9 s"),
    ],
)
def test_who_has_no_model_of_its_own_is_named(answer, text, caplog):
    arrays, config = model_arrays(), ConfigRecord({"run-key": "k"})
    grid = Answers(personal(counts=[3, 4]), answer, personal(auc=1), personal())
    sent = Sent()
    found = collect_personal(grid, arrays, config, 9, NAMED, sent)
    assert sent.keys["personal"].keys() - {"south"} == {"north", "west"}
    assert ("south" in sent.keys["personal"]) == isinstance(answer, RecordDict)
    usual = {"auc": 0.5, "val-global": 0.4, "val-own": 0.6, "personal-epochs": 2.0}
    assert found == {"north": usual, "west": usual | {"auc": 1.0}}
    assert all(type(value) is float for value in found["west"].values())
    assert caplog.messages == [f"south has no model of its own: {text}"]
    assert [message.metadata.dst_node_id for message in grid.sent] == [1, 2, 3]
    for message in grid.sent:
        assert message.metadata.message_type == "query.personal"
        assert message.content["arrays"] is arrays
        assert dict(message.content["config"]) == {"run-key": "k"}


# --- Sites that come later ----------------------------------------------------------------------


def test_a_site_that_connects_later_is_asked_and_added():
    grid = Answers(about(), about("south", train=0, **{"num-examples": 0}))
    sites = roll_call(grid, 9)
    assert sites.only() == {1}
    assert call_newcomers(grid, sites, 9) == {}
    grid.answers[7] = about("west")
    assert call_newcomers(grid, sites, 9) == {"west": None}
    assert sites.names == {1: "north", 2: "south", 7: "west"}
    assert sites.only() == {1, 7}
    assert sites.rows()["west"] == {"train": 4, "val": 2, "test": 3}
    assert len(grid.sent) == 3


def test_a_site_that_comes_back_under_another_node_id_keeps_its_name_and_its_part():
    grid = Answers(about(), about("south", train=0, **{"num-examples": 0}))
    sites = roll_call(grid, 9)
    grid.answers[9] = grid.answers.pop(2)
    assert call_newcomers(grid, sites, 9) == {"south": 2}
    assert sites.names == {1: "north", 9: "south"}
    assert sites.only() == {1}
    grid.answers[8] = grid.answers.pop(1)
    assert call_newcomers(grid, sites, 9) == {"north": 1}
    assert sites.only() == {8}


def test_a_newcomer_that_does_not_answer_is_asked_once_and_may_train():
    grid = Answers(about(), about("south", train=0, **{"num-examples": 0}))
    sites = roll_call(grid, 9)
    grid.answers[7] = None
    assert call_newcomers(grid, sites, 9) == call_newcomers(grid, sites, 9) == {}
    assert len(grid.sent) == 3
    assert sites.only() == {1, 7}
    assert sites.refused() == {"no answer within 9 s": ["node 7"]}


def test_a_newcomer_with_the_name_of_a_connected_site_is_another_one():
    grid = Answers(about())
    sites = roll_call(grid, 9)
    grid.answers[5] = about("north")
    assert call_newcomers(grid, sites, 9) == {"north (node 5)": None}


# Without figures ----------------------------------------------------------------------------------


def unnumbered(name="north", **filled):
    """Return the answer of a hospital that tells which splits have rows, and no number."""
    content = about(name)
    del content["metrics"]
    content["filled"] = ConfigRecord({"train": True, "val": True, "test": True} | filled)
    return content


def test_a_hospital_without_numbers_takes_part_and_has_none(caplog):
    grid = Answers(unnumbered("east"), unnumbered("north", train=False), about("south"))
    sites = roll_call(grid, 1)
    assert sites.rows() == {
        "east": {},
        "north": {"train": 0},
        "south": {"train": 4, "val": 2, "test": 3},
    }
    assert sites.trainers() == {1, 3}
    assert sites.only() == {1, 3}
    with caplog.at_level("INFO", "flwr.fedmed"):
        sites.write_log()
    assert "no rows in the train split at north" in caplog.messages
    assert "east: counts withheld (secure sums)" in caplog.messages
    assert "south: 4 train, 2 val, 3 test" in caplog.messages


@pytest.mark.parametrize(
    ("filled", "reason"),
    [
        ({"train": 60}, "TypeError whether a split has rows must be true or false"),
        ({"train": "yes"}, "TypeError whether a split has rows must be true or false"),
    ],
)
def test_a_number_in_place_of_whether_a_split_has_rows_is_malformed(filled, reason):
    with pytest.raises(InputError, match=says(f"malformed answer: {reason}")):
        roll_call(Answers(unnumbered(**filled)), 1)


def test_a_run_by_secure_sums_knows_no_number_of_rows(tmp_path, caplog):
    def without_test_rows(data):
        return replace(data, test=[])

    client = holding({2: without_test_rows}, predicting("binary"))
    with caplog.at_level("INFO", "flwr.fedmed"):
        _, summary = run_tables(
            tmp_path / "run", client, 5, secure="sum", preparation="declared", num_server_rounds=1
        )
    assert summary["sites"] == {f"hospital-{n}": {"test": 0} if n == 3 else {} for n in range(1, 6)}
    assert "hospital-1: counts withheld (secure sums)" in caplog.messages
    assert "no rows in the test split at hospital-3" in caplog.messages
    assert {*summary["sent"]["describe"]["hospital-1"]} >= {"filled.train", "site.name"}
    assert not any("metrics" in key for key in summary["sent"]["describe"]["hospital-1"])
    shown = (tmp_path / "run" / "report.html").read_text()
    text = "Numbers of records are withheld (secure sums): hospital-1, hospital-2, hospital-3"
    assert text in shown
