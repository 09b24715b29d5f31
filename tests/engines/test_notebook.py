import html
import re
import sys
from types import SimpleNamespace

import pytest

from fedmed_flower.cli.progress import Position
from fedmed_flower.engines import notebook
from fedmed_flower.engines.local import LocalRun
from fedmed_flower.engines.notebook import framed_report, in_notebook, inline_progress


class Display:
    """Stands for IPython.display: remembers what a cell has shown."""

    def __init__(self, monkeypatch):
        self.shown = []
        module = SimpleNamespace(HTML=lambda text: text, display=self.display)
        monkeypatch.setitem(sys.modules, "IPython.display", module)

    def display(self, text, display_id):
        assert display_id is True
        self.shown.append(text)
        return SimpleNamespace(update=self.shown.append)


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        (None, False),
        (SimpleNamespace(config={}), False),
        (SimpleNamespace(config={"IPKernelApp": {}}), True),
    ],
)
def test_only_the_kernel_of_a_notebook_is_one(monkeypatch, shell, expected):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook() is expected


def test_without_ipython_there_is_no_notebook(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()


def test_the_position_is_drawn_where_a_phase_begins_and_at_most_four_times_a_second(monkeypatch):
    display = Display(monkeypatch)
    now = [0.0]
    clock = lambda: now[0]  # noqa: E731
    inline = notebook._Inline(Position(4, clock), clock)
    assert display.shown == ['<div><progress max="4" value="0"></progress> start  0:00:00</div>']
    for now[0], line in ((0.1, "round 1/4  x"), (0.2, "round 2/4  x"), (0.3, "<b>")):
        inline.on_line(line)
    assert display.shown[1:] == [
        '<div><progress max="4" value="2"></progress> 2/4 rounds  0:00:00, 0:00:00 left</div>'
    ]


def test_a_name_in_a_message_is_text(monkeypatch):
    display = Display(monkeypatch)
    position = Position(None)
    position.read_line("for comparison: <img src=x>")
    notebook._Inline(position)
    assert display.shown == ["<div>&lt;img src=x&gt;  0:00:00</div>"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_progress_of_a_run_leaves_nothing_behind(monkeypatch, fails):
    display = Display(monkeypatch)
    with pytest.raises(RuntimeError) if fails else inline_progress(3), inline_progress(3):
        if fails:
            raise RuntimeError
    assert display.shown[-1] == ""


def test_the_report_stands_in_a_frame_that_runs_nothing(tmp_path):
    report = "<title>a \"b\" & 'c'</title><script>alert(1)</script>"
    (tmp_path / "report.html").write_text(report)
    shown = LocalRun(None, None, tmp_path)._repr_html_()
    (sandbox, content) = re.fullmatch(
        r'<iframe (sandbox) title="[^"]*" srcdoc="([^"]*)" style="[^"]*"></iframe>', shown
    ).groups()
    assert sandbox == "sandbox"
    assert html.unescape(content) == report


def test_without_a_report_the_run_is_shown_as_text(tmp_path, monkeypatch):
    assert LocalRun(None, None, None)._repr_html_() is None
    assert framed_report(tmp_path) is None
    (tmp_path / "report.html").write_text("x" * 100)
    monkeypatch.setattr(notebook, "_MOST_REPORT", 10)
    assert framed_report(tmp_path) == (
        f"<p>{tmp_path}/report.html cannot be shown here (it has 100 bytes, more than 10).</p>"
    )
