import asyncio
import re
from importlib.resources import files

import httpx
import pytest
from live_runs import rounds_of, write_live, write_metrics

from fedmed_flower.cli.serving import WatchPage
from fedmed_flower.data.pictures import PALETTE
from fedmed_flower.reports import frame

PORT = 8123
HERE = f"http://127.0.0.1:{PORT}"
PAGE = files("fedmed_flower.cli").joinpath("watch.html").read_text(encoding="utf-8")


class Asking:
    """Sends requests to the page of a folder, without a server between."""

    def __init__(self, folder, base=HERE, port=PORT):
        self._base = base
        self._transport = httpx.ASGITransport(WatchPage(folder, port, "secret"))

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def request(self, method, path, **options):
        async def send():
            async with httpx.AsyncClient(
                transport=self._transport, base_url=self._base, trust_env=False
            ) as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())


def test_the_page_the_state_and_the_report_stand_behind_the_token(tmp_path):
    write_metrics(tmp_path, rounds_of(2))
    (tmp_path / "report.html").write_text("<p>report</p>")
    asking = Asking(tmp_path)
    assert asking.get("/secret/").text == PAGE
    state = asking.get("/secret/state").json()
    assert (state["round"], state["curve"]["metric"], len(state["curve"]["values"])) == (
        2,
        "auc",
        8,
    )
    assert asking.get("/secret/report").text == "<p>report</p>"
    for path in ("/", "/secret", "/other/", "/other/state", "/secret/state/", "/secret/live.json"):
        answer = asking.get(path)
        assert (path, answer.status_code) == (path, 404)
        assert "secret" not in answer.text


def test_only_what_is_new_comes(tmp_path):
    write_metrics(tmp_path, rounds_of(2))
    asking = Asking(tmp_path)
    first = asking.get("/secret/state")
    tag = {"If-None-Match": first.headers["ETag"]}
    again = asking.get("/secret/state", headers=tag)
    assert (again.status_code, again.content) == (304, b"")
    write_metrics(tmp_path, rounds_of(3))
    known = first.json()["curve"]
    query = {"phase": "val", "metric": "auc", "since": known["until"]}
    query["generation"] = known["generation"]
    new = asking.get("/secret/state", headers=tag, params=query).json()["curve"]
    assert new["rounds"] == [3] * 4
    # Whatever stands for a number in the query, all comes.
    for wrong in ("-1", "x", "9" * 5000, "1.5", ""):
        answer = asking.get("/secret/state", params=query | {"generation": wrong}).json()["curve"]
        assert len(answer["rounds"]) == 12
    none = asking.get("/secret/state", params={"phase": "val", "metric": "none"}).json()
    assert none["curve"]["rounds"] == []


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:1", "", "[::1]:8123"]
)
def test_a_request_that_was_addressed_elsewhere_is_refused(tmp_path, host):
    answer = Asking(tmp_path).get("/secret/state", headers={"Host": host})
    assert (answer.status_code, answer.text) == (421, "this is not the address of the page")


def test_two_hosts_are_refused_and_each_name_of_this_machine_is_answered(tmp_path):
    two = [("Host", f"127.0.0.1:{PORT}"), ("Host", "evil.example")]
    assert Asking(tmp_path).get("/secret/", headers=two).status_code == 421
    assert Asking(tmp_path, f"http://localhost:{PORT}").get("/secret/").status_code == 200
    assert Asking(tmp_path, "http://127.0.0.1", port=80).get("/secret/").status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
def test_only_get_is_answered(tmp_path, method):
    assert Asking(tmp_path).request(method, "/secret/state").status_code == 405


@pytest.mark.parametrize("path", ["/secret/", "/secret/state", "/secret/report", "/other"])
def test_no_other_site_may_read_frame_or_feed_what_is_answered(tmp_path, path):
    write_live(tmp_path)
    (tmp_path / "report.html").write_text("<p>report</p>")
    headers = Asking(tmp_path).get(path, headers={"Origin": "https://evil.example"}).headers
    assert not [name for name in headers if name.startswith("access-control")]
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert re.search(r"frame-ancestors '(none|self)'", policy)
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe-inline'" not in policy
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_the_report_of_a_stranger_runs_no_script_but_that_of_reports(tmp_path):
    (tmp_path / "report.html").write_text("<script>alert(1)</script>")
    policy = Asking(tmp_path).get("/secret/report").headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts; default-src 'none'; script-src 'sha256-")
    # The one that the page of a report allows as well.
    (own,) = re.findall(r"script-src ('sha256-[^']*')", policy)
    assert f"script-src {own}" in frame.page("title", "<p>body</p>")
    assert "script-src 'unsafe-inline'" not in policy


def test_a_folder_without_report_has_none(tmp_path):
    answer = Asking(tmp_path / "none").get("/secret/report")
    assert (answer.status_code, answer.text) == (
        404,
        "there is no report: No such file or directory",
    )


def test_the_page_loads_nothing_and_makes_no_html_of_texts():
    assert re.findall(r"https?://[^\"]+", PAGE) == ["http://www.w3.org/2000/svg"]
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", " on"):
        assert not re.search(rf"{re.escape(word)}\w*=" if word == " on" else re.escape(word), PAGE)


def test_the_page_has_the_colours_of_the_report():
    def palettes(text):
        pattern = r"--(paper|ink|soft|line|tint|bad|good):(#[0-9a-f]{3,6})"
        return {*re.findall(pattern, text.replace("\n", ""))}

    style = files("fedmed_flower.reports").joinpath("style.css").read_text(encoding="utf-8")
    assert palettes(PAGE) == palettes(style)
    listed = re.search(r"const PALETTE = \[(.*?)\]", PAGE, re.DOTALL)[1]
    assert re.findall(r"#[0-9a-f]{6}", listed) == [*PALETTE]
