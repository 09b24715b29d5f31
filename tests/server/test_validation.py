"""A training reply and its validation figures, taken apart."""

from builders import arrays, reply
from flwr.app import ConfigRecord, MetricRecord

from fedmed_flower.server.validation import NO_FIGURES, Validation, parted


def test_the_parts_of_a_reply_and_the_reply_itself():
    whole = reply(7, {"w": [1.0]}, "north", weight=3)
    figures = MetricRecord({"num-examples": 2, "auc": 0.5})
    whole.content["validation"] = figures
    trained, validated = parted(whole, 7)
    assert {*trained.content} == {"arrays", "metrics", "site"}
    assert trained.metadata is whole.metadata
    assert dict(validated.content) == {"metrics": figures, "site": whole.content["site"]}
    assert validated.metadata.src_node_id == 7
    assert validated.metadata.message_type == "evaluate"
    assert {*whole.content} == {"arrays", "metrics", "site", "validation"}


def test_a_reply_without_figures_is_an_error_that_says_why():
    for part, reason in (
        (None, NO_FIGURES),
        (arrays(w=[1.0]), NO_FIGURES),
        (ConfigRecord({"why": "site north: ValueError"}), "site north: ValueError"),
    ):
        whole = reply(7, {"w": [1.0]}, "north")
        if part is not None:
            whole.content["validation"] = part
        trained, validated = parted(whole, 7)
        assert "validation" not in trained.content
        assert validated.error.reason == reason
        assert not validated.has_content()


def test_who_is_missing():
    asked = Validation((3, 1, 2), {1: reply(1)})
    assert asked.missing == [3, 2]
    assert Validation().missing == []
