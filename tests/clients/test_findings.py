import json
import logging

import numpy as np
import pytest
import torch
from eyes import FINDINGS, Findings, run_eyes
from tiny import ask, context_of, fixed, make_rows, model_arrays, node_of, says
from torch import nn

from fedmed_flower import FindingsClient, InputError, SiteData
from fedmed_flower.clients.findings import _ReadCrossEntropy


class Two(FindingsClient):
    """Looks for two findings in images of two by two."""

    findings = ("edema", "mass")
    image_shape = (1, 2, 2)

    def build_model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    def load_data(self, site):
        raise NotImplementedError


def rows_of(count, seed=0, name="p", unread=()):
    rows = []
    for number, row in enumerate(make_rows(count, seed, name)):
        label = {"edema": row["label"], "mass": number // 2 % 2}
        rows.append(row | {"label": {k: v for k, v in label.items() if k not in unread}})
    return rows


def start(client=Two):
    return model_arrays(lambda: client.build_model(None))


def measured(client, context, **config):
    reply = ask(client, "evaluate", context, start(), split="test", **config)
    assert not reply.has_error(), reply.error.reason
    return dict(reply.content["metrics"])


def test_two_hospitals_learn_findings_of_which_one_is_read_at_one_alone(tmp_path):
    run_eyes(tmp_path, Findings, 3)
    summary = json.loads((tmp_path / "summary.json").read_text())
    together = summary["test"]["federated"]
    assert together["auc"] > 0.85
    assert {name: together[f"num-examples@finding={name}"] for name in FINDINGS} == {
        "haemorrhages": 120,
        "exudates": 60,
        "large cup": 120,
    }
    assert together["auc@finding=exudates"] > 0.9
    second = summary["test"]["sites"]["hospital-2"]
    assert "auc@finding=exudates" not in second
    assert second["auc@finding=haemorrhages"] > 0.8
    page = (tmp_path / "report.html").read_text()
    assert "By finding" in page
    assert "group of finding differ" not in page


def test_what_was_not_read_adds_nothing_to_the_loss():
    outputs = torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[1.0, torch.nan], [0.0, 1.0], [torch.nan, torch.nan]])
    loss = _ReadCrossEntropy()(outputs, labels)
    loss.backward()
    read = ~labels.isnan()
    given = outputs.detach()
    expected = nn.functional.binary_cross_entropy_with_logits(
        given[read], labels[read], reduction="sum"
    )
    assert loss.item() == pytest.approx(expected.item() / 6)
    assert torch.equal(outputs.grad != 0, read)
    # A batch of two is the mean of each alone: a hospital that reads less has no more weight.
    alone = [_ReadCrossEntropy()(given[i : i + 1], labels[i : i + 1]) for i in range(3)]
    assert loss.item() == pytest.approx(torch.stack(alone).mean().item())


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ({"edema": 2}, "label of edema is 2: it must be 1, 0 or None"),
        ({"edema": "yes"}, "label of edema is 'yes': it must be 1, 0 or None"),
        ({"oedema": 1}, "label names 'oedema', which is none of the findings edema, mass"),
        (1, "label 1 is no dict of findings, such as {'edema': 1}"),
        ({"edema": None, "mass": np.nan}, "none of its findings was read"),
        ({}, "none of its findings was read"),
    ],
)
def test_a_row_with_another_label_is_rejected(caplog, label, problem):
    rows = rows_of(4)
    rows[1] = rows[1] | {"label": label}
    client = fixed(SiteData(rows), Two)(context_of())
    assert client.screened("train") == [rows[0], *rows[2:]]
    messages = [record.getMessage() for record in caplog.records]
    assert f"hospital-1: rejected, train split, patient p-1: {problem}" in messages


def test_numbers_of_numpy_and_true_are_labels_too():
    rows = rows_of(2)
    rows[0] = rows[0] | {"label": {"edema": np.float64(1.0), "mass": np.nan}}
    rows[1] = rows[1] | {"label": {"edema": False, "mass": np.bool_(True)}}
    client = fixed(SiteData(rows), Two)(context_of())
    labels = client.batch_of(client.prepared("train", False)[1], range(2))["label"]
    torch.testing.assert_close(
        labels, torch.tensor([[1, torch.nan], [0, 1]]), equal_nan=True, check_dtype=False
    )


def test_many_labels_that_are_coded_otherwise_stop_the_hospital():
    rows = [row | {"label": {"oedema": 1}} for row in rows_of(4)]
    client = fixed(SiteData(rows), Two)(context_of())
    with pytest.raises(
        InputError,
        match=r"^4 of 4 rows of the train split have labels that are no "
        r"findings, .*; give 1, 0 or nothing for each finding that the client names$",
    ):
        client.screened("train")


@pytest.mark.parametrize(
    "names", ["edema", (), ("a", "a"), ("a@b",), ("a=b",), ("",), (1,), ("a\n",)]
)
def test_names_that_cannot_be_are_refused(names):
    client = fixed(SiteData(rows_of(2)), Two, findings=names)(context_of())
    text = (
        "findings must be a tuple of one or more different names, each of at most 80 printable "
        f"letters without @ and =, got {names!r}"
    )
    with pytest.raises(InputError, match=says(text)):
        client.data()


def test_a_network_with_other_outputs_is_refused():
    client = fixed(SiteData(rows_of(4)), Two)(context_of())
    text = "the network returns outputs of shape (2, 3): 2 findings need (rows, 2)"
    with pytest.raises(InputError, match=says(text)):
        client._outputs(torch.zeros(2, 3))


def test_findings_that_nobody_read_are_named_in_the_log(caplog):
    caplog.set_level(logging.WARNING)
    fixed(SiteData(rows_of(4, unread=["mass"])), Two)(context_of()).data()
    assert "hospital-1: no training row says of mass" in caplog.messages


def test_a_finding_read_in_too_few_patients_has_no_figure():
    rows = rows_of(12, 1, "t")
    few = [row if n < 4 else row | {"label": {"edema": n % 2}} for n, row in enumerate(rows)]
    client = fixed(SiteData(rows_of(4), test=few), Two)
    found = measured(client, context_of(min_cell_count=5))
    assert found["num-examples@finding=edema"] == 12
    assert not [name for name in found if name.endswith("@finding=mass")]
    found = measured(client, context_of(min_cell_count=4))
    assert found["num-examples@finding=mass"] == 4


def test_at_a_real_hospital_one_more_reading_is_not_told(tmp_path):
    """The difference of two figures would be one patient's finding."""
    counts = []
    for unread in (1, 0):
        rows = [
            row if n >= unread else row | {"label": {"edema": n % 2}}
            for n, row in enumerate(rows_of(24, 1, "t"))
        ]
        client = fixed(SiteData(rows_of(12), test=rows), Two)
        found = measured(client, context_of(node_config=node_of(tmp_path)))
        counts.append(found.get("num-examples@finding=mass"))
        assert found["num-examples@finding=edema"] == 24
    assert counts[0] == 23
    assert counts[1] in (23, None)


def test_pictures_name_a_finding_and_whether_it_is_there():
    rows = rows_of(3)
    rows[1] = rows[1] | {"label": {"edema": 1}}
    client = fixed(SiteData(rows), Two)(context_of())
    model = client.build_model()
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([-1.0, 2.0])
    titles = [picture.title for picture in client.draw(model, client.prepare(rows, False), 3)]
    # The first says no to an edema and has none, and yes to a mass: it is wrong in one, surely.
    assert titles == [
        "the highest loss: mass (absent), given 88%",
        "case 2: mass (not read), given 88%",
        "case 3: mass (there), given 88%",
    ]


@pytest.mark.parametrize("unread", [(), ("mass",)])
def test_a_private_round_hides_which_findings_were_read(tmp_path, unread):
    data = SiteData(rows_of(12, unread=unread), test=rows_of(12, 1, "t", unread))
    client = fixed(data, Two)
    context = context_of(run_dir=str(tmp_path), privacy="patient", target_epsilon=8.0)
    reply = ask(client, "train", context, start())
    assert not reply.has_error(), reply.error.reason
    moved = reply.content["arrays"].to_torch_state_dict()
    assert not torch.equal(moved["1.weight"], start().to_torch_state_dict()["1.weight"])
    found = measured(client, context)
    # Names and sizes are the same, whatever was read.
    assert {"noised-counts@finding=edema", "noised-counts@finding=mass"} <= {*found}
    assert "loss" not in found
