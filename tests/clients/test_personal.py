import csv
import io

import pytest
from flwr.app import ArrayRecord
from safetensors.torch import load_file
from tables import SCHEMA, TinySurvival, TinyTable, holding, patients, run_tables
from tiny import TinyClient, ask, bits, context_of, node_of, run_tiny, says_of_setting, see
from torch import nn

from fedmed_flower import InputError, SiteData
from fedmed_flower.data.preparation import Preparation
from fedmed_flower.models.device import make_optimizer
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.wire import read_error

TOLD = ("val-global", "val-own", "personal-epochs")
RUN = {"num_server_rounds": 1, "personal_epochs": 3}
AGREED = Preparation.of_rows(SCHEMA, patients(50, 9)).to_text()


class Agreeing(TinyTable):
    """Needs no first round."""

    def read(self, message):
        config = super().read(message)
        self.agreed = AGREED
        return config


def personal_of(client, index=0, run_id=None, node_config=None, arrays=None, **config):
    context = context_of(index, 3, run_id, node_config, personal_epochs=3, **config)
    own = client(context)
    own.agreed = AGREED
    if arrays is None:
        model = own.build_model()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        arrays = ArrayRecord(model.state_dict())
    return ask(client, "query.personal", context, arrays)


def metrics_of(*args, **config):
    reply = personal_of(*args, **config)
    assert not reply.has_error(), reply.error.reason
    return dict(reply.content["metrics"])


def error_of(*args, **config):
    reply = personal_of(*args, **config)
    assert reply.has_error()
    return read_error(reply.error.reason)[1]


def table_of(folder):
    return list(csv.DictReader(io.StringIO((folder / "metrics.csv").read_text())))


def test_the_kept_model_is_in_the_folder_and_has_the_figures_that_are_told(tmp_path):
    result, summary = run_tables(tmp_path, **RUN, learning_rate=0.2)
    personal = summary["test"]["personal"]
    assert set(personal) == {"hospital-1", "hospital-2", "hospital-3"}
    assert {path.name for path in (tmp_path / "personal").iterdir()} == {
        f"{name}.safetensors" for name in personal
    }
    agreed = RunFolder(tmp_path).read_config()["run"]["agreed"]
    for index, (name, told) in enumerate(personal.items()):
        state = load_file(tmp_path / "personal" / f"{name}.safetensors")
        own = TinyTable(context_of(index, 3))
        own.agreed = agreed
        models = {"val-own": own.build_model(), "val-global": own.build_model()}
        models["val-own"].load_state_dict(state)
        models["val-global"].load_state_dict(result.arrays.to_torch_state_dict())
        val = own.prepared("val", pooled=False)[1]
        for which, model in models.items():
            assert told[which] == pytest.approx(own.measure(model, val)["auc"])
        test = own.measure(models["val-own"], own.prepared("test", pooled=False)[1])
        assert {key: told[key] for key in told if key not in TOLD} == pytest.approx(
            {key: value for key, value in test.items() if isinstance(value, int | float)}
        )
        assert 0 <= told["personal-epochs"] <= 3
        kept = {key: value.numpy().tobytes() for key, value in state.items()}
        assert (kept == bits(result.arrays)) == (told["personal-epochs"] == 0)
    assert max(told["personal-epochs"] for told in personal.values()) > 0
    table = {
        (row["site"], row["metric"]): float(row["value"])
        for row in table_of(tmp_path)
        if row["phase"] == "personal-test"
    }
    assert table == {
        (site, name): value for site, told in personal.items() for name, value in told.items()
    }
    assert "Fine-tuned at the hospital" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("client", [TinyTable, TinySurvival])
def test_no_hospital_is_worse_on_its_validation_rows_whatever_training_does(client, tmp_path):
    """Fine-tuning turns the model into its contrary, or into one that overflows."""
    for factor in (-30.0, 1e38):

        def fit(self, model, prepared, seed, factor=factor):
            # One pass is what fine-tuning takes at a time; rounds here are two.
            for parameter in model.parameters() if self.settings.local_epochs == 1 else ():
                parameter.data.mul_(factor)
            return client.fit(self, model, prepared, seed)

        folder = tmp_path / str(factor)
        reckless = type("Reckless", (client,), {"fit": fit})
        result, summary = run_tables(folder, reckless, local_epochs=2, **RUN)
        personal = summary["test"]["personal"]
        assert len(personal) == 3
        for name, told in personal.items():
            assert told["val-own"] >= told["val-global"]
            if factor == 1e38:
                assert told["personal-epochs"] == 0
                state = load_file(folder / "personal" / f"{name}.safetensors")
                assert {k: v.numpy().tobytes() for k, v in state.items()} == bits(result.arrays)
                # Then the figures on test rows are the global model's.
                test = summary["test"]["sites"][name]
                assert {k: v for k, v in told.items() if k not in TOLD} == pytest.approx(test)
                log = (folder / "log.txt").read_text()
                assert f"{name}: fine-tuning ends in pass " in log


def test_a_pass_is_one_at_the_first_rate_whatever_the_rounds_are():
    seen = []

    class Watched(Agreeing):
        def fit(self, model, prepared, seed):
            settings = self.settings
            rate = make_optimizer(settings, model, self.progress).param_groups[0]["lr"]
            seen.append((settings.local_epochs, settings.local_steps, rate))
            return super().fit(model, prepared, seed)

    config = {"local_steps": 9, "local_epochs": 4, "schedule": "cosine", "num_server_rounds": 5}
    metrics_of(Watched, **config)
    assert seen == [(1, 0, 0.05)] * 3


def test_fine_tuning_follows_from_seed_and_site():
    rows = patients(60, 1)
    alike = SiteData(train=rows[:40], val=rows[40:50], test=rows[50:])
    client = holding({0: alike, 1: alike}, Agreeing)
    places = ((0, 0), (0, 0), (0, 1), (1, 0))
    told = [metrics_of(client, index, seed=seed) for index, seed in places]
    assert told[0] == told[1]
    assert told[0] != told[2]
    assert told[0] != told[3]


def test_of_passes_that_reach_the_same_the_one_with_the_least_loss_is_kept():
    class Separable(Agreeing):
        def load_data(self, site):
            # The AUC is 1 from the first pass on, and the loss goes down with each.
            rows = patients(60, 1)
            rows = [row | {"ill": int(row["age"] > 55)} for row in rows]
            return SiteData(train=rows[:40], val=rows[40:])

    told = metrics_of(Separable, learning_rate=0.2)
    assert told["val-own"] == 1
    assert told["personal-epochs"] == 3
    assert told["num-examples"] == 0


def test_groups_and_sums_are_not_told_twice():
    found = metrics_of(Agreeing, report_by="sex")
    assert not [name for name in found if "@" in name]


def test_a_hospital_can_decline(tmp_path):
    client, north = Agreeing, node_of(tmp_path)
    text = "declined: personal=false in the hospital's node config"
    assert error_of(client, node_config=north | {"personal": False}) == text
    text = "declined: a personal model is trained without noise"
    private = {"privacy": "patient", "preparation": "declared"}
    wards = SCHEMA.categories | {"ward": ("a", "b", "c")}
    declared = holding({}, schema=type(SCHEMA)(**vars(SCHEMA) | {"categories": wards}))
    assert error_of(declared, node_config=north, **private) == text
    budget = north | {"budget-epsilon": 1.0, "budget-delta": 1e-5}
    assert error_of(client, node_config=budget) == text
    assert error_of(client, node_config=north | {"private-metrics": True}) == text
    assert error_of(client, node_config=north | {"personal": "no"}) == "InputError"
    text = "personal must be of type bool, got 'no'; see `fedmed settings --search personal`"
    node = {"partition-id": 0, "num-partitions": 3, "personal": "no"}
    assert error_of(client, node_config=node) == text


def test_a_hospital_without_rows_to_learn_from_or_to_judge_by():
    rows = patients(20, 1)
    only = holding({0: SiteData(train=rows)}, Agreeing)
    text = "there are no validation rows, by which fine-tuning is judged: give this site some"
    assert error_of(only) == text
    assert error_of(holding({0: SiteData(train=(), val=rows)}, Agreeing)) == (
        "there are no training rows"
    )


def test_a_real_hospital_keeps_its_model_in_its_own_folder_or_nowhere(tmp_path, caplog):
    for name in ("data", "own"):
        (tmp_path / name).mkdir()
    north = node_of(tmp_path / "data")
    told = metrics_of(Agreeing, node_config=north)
    kept = metrics_of(Agreeing, 0, 77, north | {"output-dir": str(tmp_path / "own")})
    assert kept == told
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["north.safetensors"]
    assert (tmp_path / "own" / "77" / "personal" / "north.safetensors").exists()
    assert error_of(Agreeing, node_config=north | {"output-dir": "/nowhere"}) == "InputError"
    assert caplog.messages[-1] == "north: output-dir of site north is not a folder: /nowhere"


@pytest.mark.parametrize(("fewest", "tellable"), [(20, True), (21, False), (41, False)])
def test_a_model_whose_figures_are_of_too_few_stays_and_is_not_told_of(tmp_path, fewest, tellable):
    for name in ("data", "own"):
        (tmp_path / name).mkdir()
    # 20 validation patients and 40 test patients.
    node = node_of(tmp_path / "data", min_evaluated_patients=fewest)
    reply = personal_of(
        Agreeing, run_id=77, node_config=node | {"output-dir": str(tmp_path / "own")}
    )
    assert (tmp_path / "own" / "77" / "personal" / "north.safetensors").exists()
    ledger = Ledger(tmp_path / "data" / "privacy-ledger.sqlite", read_only=True)
    told = {entry.purpose: entry.patients for entry in ledger.plain()}
    if tellable:
        assert reply.content["metrics"]["num-examples"] == 40
        assert told == {"personal val": 20, "personal test": 40}
    else:
        text = "declined: too few patients are behind the metrics of the personal model"
        assert read_error(reply.error.reason) == ("north", text)
        assert "personal val" not in told


def test_figures_of_a_model_of_its_own_are_coarse_where_the_hospital_says_so(tmp_path):
    exact = metrics_of(Agreeing)
    north = node_of(tmp_path, "hospital-1", coarse_figures=True)
    coarse = metrics_of(Agreeing, node_config=north, torch_threads=1)
    assert {*TOLD, "loss"} <= coarse.keys() <= exact.keys()
    assert exact["loss"] != coarse["loss"] == float(f"{exact['loss']:.3g}")
    for name in ("val-global", "val-own"):
        assert coarse[name] == float(f"{coarse[name]:.3g}")
    # One bin for ten patients, and no confusion matrix with a cell of fewer.
    assert [count for count in coarse["score-counts"] if count > 0] == [19, 11, 10]
    assert "confusion-counts" in exact.keys() - coarse.keys()


def test_the_run_names_who_has_no_model_of_its_own(tmp_path):
    nodes = [{}, {"personal": False}, node_of(tmp_path)]
    client = holding({2: lambda data: SiteData(train=data.train, test=data.test)})
    _, summary = run_tables(tmp_path / "run", client, node_configs=nodes, **RUN)
    assert set(summary["test"]["personal"]) == {"hospital-1"}
    log = (tmp_path / "run" / "log.txt").read_text()
    text = "has no model of its own: "
    assert f"hospital-2 {text}declined: personal=false in the hospital's node config" in log
    assert f"north {text}InputError" in log
    assert "north: there are no validation rows, by which fine-tuning is judged" in log
    assert summary["status"] == "finished"


def test_a_run_that_asks_for_none_has_none(tmp_path):
    _, summary = run_tables(tmp_path, num_server_rounds=1)
    assert "personal" not in summary["test"]
    assert not (tmp_path / "personal").exists()


def test_a_finished_run_can_be_gone_on_with_for_personal_models(tmp_path):
    run_tables(tmp_path / "a", num_server_rounds=1)
    _, later = run_tables(tmp_path / "a", resume=True, **RUN)
    _, whole = run_tables(tmp_path / "b", **RUN)
    assert later["test"] == whole["test"]


def test_personal_epochs_are_checked():
    client = Agreeing
    text = "personal-epochs must be from 0 to 10,000, got -1"
    with pytest.raises(InputError, match=says_of_setting(text)):
        client(context_of(personal_epochs=-1))
    context = context_of(personal_epochs=0)
    reply = ask(client, "query.personal", context, ArrayRecord())
    text = "personal-epochs must be at least 1 to fine-tune, got 0" + see("personal-epochs")
    assert read_error(reply.error.reason)[1] == text


def test_few_training_patients_teach_no_model_of_which_figures_leave(tmp_path):
    train = patients(9, 1)
    val, test = patients(20, 2, "val"), patients(20, 3, "test")
    few = holding({0: SiteData(train=train, val=val, test=test)}, Agreeing)
    node = node_of(tmp_path)
    text = "declined: an update here needs at least 10 patients"
    assert error_of(few, node_config=node) == text
    metrics_of(few, node_config=node | {"min-train-patients": 9})


class Tied(nn.Module):
    """A head whose weight is that of the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.embedding.weight

    def forward(self, images):
        return self.head(self.embedding(images.flatten(1)))[:, :2]


def test_a_model_with_tied_weights_is_kept(tmp_path):
    client = type("TiedClient", (TinyClient,), {"build_model": lambda self: Tied()})
    run_tiny(tmp_path, client, model=Tied, **RUN)
    state = load_file(tmp_path / "personal" / "hospital-1.safetensors")
    assert (tmp_path / "personal" / "hospital-2.safetensors").exists()
    assert state["head.weight"].equal(state["embedding.weight"])
