"""What is refused, by name and with the way out."""

import pytest
from flwr.serverapp import strategy as flower
from squares import Squares, run_squares
from tiny import says, says_of_setting, see
from torch import nn

from fedmed_flower.errors import InputError
from fedmed_flower.methods import Method, register
from fedmed_flower.methods.registry import method_of, names
from fedmed_flower.runs.verdict import RunFailedError
from fedmed_flower.strategies import DPFedAvg, FedAdam, FedAvg, FedProx, QFedAvg


def refused(folder, client=Squares, strategy=None, **settings):
    with pytest.raises(InputError) as caught:
        run_squares(folder / "run", client, strategy, **settings)
    assert not (folder / "run").exists()
    return str(caught.value)


@pytest.mark.parametrize("method", ["scaffold", "feddyn", "fednova"])
def test_methods_for_plain_sgd_refuse_other_optimizers(method, tmp_path):
    text = f"{method} is right with plain SGD alone: set optimizer=sgd and momentum=0, got "
    assert refused(tmp_path, method=method, optimizer="adam") == f"{text}adam" + see("optimizer")
    assert refused(tmp_path, method=method, momentum=0.9) == f"{text}sgd with momentum=0.9" + see(
        "optimizer"
    )


def test_fedrep_needs_kept_layers(tmp_path):
    assert "set keep to patterns of the last layers" in refused(tmp_path, method="fedrep")


def test_an_unknown_method_is_named_with_all_there_are(tmp_path):
    wanted = f"method must be one of {', '.join(names())}, got 'scafold'"
    assert refused(tmp_path, method="scafold") == wanted + see("method")


@pytest.mark.parametrize("method", ["", "scaffold"])
def test_a_setting_of_another_method_has_no_effect_and_is_refused(method, tmp_path):
    name = method or "no method"
    wanted = f"ditto-lambda has no effect in a run with {name}: leave it out"
    assert refused(tmp_path, method=method, ditto_lambda=0.5) == wanted + see("ditto-lambda")


@pytest.mark.parametrize("method", ["ditto", "apfl", "moon"])
def test_what_touches_patients_again_is_refused_in_private_runs(method, tmp_path):
    wanted = f"{method} uses patients' rows beside the training that has noise: it is for runs "
    text = refused(tmp_path, method=method, privacy="patient", target_epsilon=3.0)
    assert text == wanted + 'without privacy="patient"' + see("method")


def test_kept_layers_must_be_there_and_leave_some_to_share(tmp_path):
    assert "keep=norm, but the network has no normalisation layer" in refused(tmp_path, keep="norm")
    text = refused(tmp_path, keep="head.*")
    assert (
        "keep: no parameter or buffer matches 'head.*'; the network has 1, such as weight" in text
    )
    assert "keep must leave a layer to be learned together" in refused(tmp_path, keep="*")


def private():
    return DPFedAvg(noise_multiplier=1.0, clipping_norm=1.0, population_size=2)


@pytest.mark.parametrize("method", ["scaffold", "fednova", "feddyn"])
@pytest.mark.parametrize(
    "strategy", [private, lambda: QFedAvg(client_learning_rate=0.1)], ids=["DPFedAvg", "QFedAvg"]
)
def test_rules_for_models_alone_take_no_further_arrays(method, strategy, tmp_path):
    made = strategy()
    text = refused(tmp_path, strategy=made, method=method)
    wanted = "takes no method with further arrays or a step of its own at the server"
    assert text.startswith(f"{type(made).__name__} {wanted}, got {method}: take FedAvg")


def test_two_things_that_move_the_model_or_choose_the_sites_are_refused(tmp_path):
    text = refused(tmp_path, strategy=FedAdam(), method="feddyn")
    assert text.startswith("feddyn and the server optimiser of FedAdam would both move the model")
    text = refused(tmp_path, strategy=private(), method="cyclic")
    assert text == "cyclic and DPFedAvg would both choose the sites of a round: take FedAvg"


def test_two_methods_are_refused(tmp_path):
    text = refused(tmp_path, strategy=FedProx(proximal_mu=0.1), method="ditto")
    assert text == "FedProx is a method of its own, got ditto: take FedAvg"
    text = refused(tmp_path, strategy=FedAvg(method="ditto"), method="apfl")
    assert text.startswith("FedAvg was made with the method ditto, and the run config asks for")
    with pytest.raises(
        InputError, match=says("FedProx is a method of its own, got apfl: take FedAvg")
    ):
        FedProx(proximal_mu=0.1, method="apfl")


def test_a_rule_of_somebody_else_takes_no_further_arrays():
    class Theirs(flower.FedAvg):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, replies)

    class Mixed(FedAvg, Theirs):
        pass

    with pytest.raises(InputError, match="Mixed takes no method with further arrays"):
        Mixed(method="scaffold")


class Loop(Squares):
    """A training loop of its own, which knows no method."""

    def fit(self, model, prepared, seed):
        return {"loss": 1.0}


def test_a_training_loop_that_ignores_the_method_is_refused(tmp_path):
    with pytest.raises(RunFailedError, match="Loop has a fit of its own that ignores the method"):
        run_squares(tmp_path / "run", Loop, method="scaffold")
    assert run_squares(tmp_path / "plain", Loop).arrays


def test_what_is_no_method_is_refused():
    with pytest.raises(
        InputError, match=says_of_setting("method must be a name or a Method, got 3")
    ):
        method_of(3)


def test_a_registered_name_is_taken_once():
    class Mine(Method):
        name = "ditto"

    with pytest.raises(InputError, match="there is a method 'ditto' already: give Mine another"):
        register(Mine)
    with pytest.raises(InputError, match="Method needs a name to be registered: set `name`"):
        register(Method)


@pytest.mark.parametrize("settings", [{"keep": "0.*"}, {"method": "ditto"}])
def test_the_best_round_s_model_does_not_go_with_own_models(settings, tmp_path):
    class Two(Squares):
        def build_model(self):
            return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    name = settings.get("method", "keep")
    text = refused(tmp_path, Two, keep_model="best", **settings)
    assert text.startswith(f"keep_model='best' excludes {name}: each site's own model is that of")
