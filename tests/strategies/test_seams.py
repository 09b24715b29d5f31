"""The places at which a method hangs on the rounds, each with the smallest real case.

Each case is run under a mean, a robust rule and a server optimiser, with a site that fails, a reply
that screening refuses, and a crash; what comes out must be what the plain strategy makes of what
the sites mean, to the bit.
"""

import numpy as np
import pytest
from builders import arrays, dump, run, site_app
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedmed_flower.server.ask import ask_all
from fedmed_flower.server.screening import with_arrays
from fedmed_flower.strategies import DPFedAvg, FedAdam, FedAvg, FedMedian

RULES = pytest.mark.parametrize("rule", [FedAvg, FedMedian, FedAdam], ids=lambda r: r.__name__)
INITIAL = arrays(w=np.zeros(3, np.float32))
SITES, ROUNDS = 4, 3


def made_of(seam, rule, **options):
    """Return a strategy of this rule with the seam before it."""
    cls = type(f"{seam.__name__}{rule.__name__}", (seam, rule), {}) if seam else rule
    return cls(fraction_evaluate=0.0, seed=1, **options | ({"eta": 0.1} if rule is FedAdam else {}))


def drift(values, number, server_round):
    """Where a site's training leads to; in steps that floats of any width hold."""
    return values["w"] * np.float32(0.5) + np.float32(number + server_round / 4)


def number_of(context):
    return int(context.node_config["partition-id"])


def round_of(message):
    return int(message.content["config"]["server-round"])


def reply(message, context, record, **more):
    content = RecordDict({"metrics": MetricRecord({"num-examples": 1})} | more)
    content["site"] = ConfigRecord({"name": f"site-{number_of(context)}"})
    if record is not None:
        content["arrays"] = record
    return Message(content, reply_to=message)


def plain(values, message, context):
    """The sites that a plain strategy is run with: site 3 fails in round 2."""
    number, server_round = number_of(context), round_of(message)
    if (number, server_round) == (3, 2):
        raise OSError("the disk is gone")
    return {"w": drift(values, number, server_round)}, {}


def expected(rule, app=None):
    strategy = made_of(None, rule)
    run(strategy, app or site_app(plain), INITIAL, ROUNDS, SITES)
    return dump(strategy.result.arrays)


def unbroken_and_resumed(seam, rule, app, folder):
    """Run without and with a crash after the second round; return both strategies."""
    whole = made_of(seam, rule)
    run(whole, app, INITIAL, ROUNDS, SITES)
    run(made_of(seam, rule, run_dir=folder), app, INITIAL, 2, SITES)
    resumed = made_of(seam, rule, run_dir=folder, resume=True)
    run(resumed, app, INITIAL, ROUNDS, SITES)
    assert dump(whole.result.arrays) == dump(resumed.result.arrays)
    assert whole.history.failures == resumed.history.failures
    return whole, resumed


def failures(strategy):
    return [(each.round, each.site, each.reason) for each in strategy.history.failures]


class Unmasking:
    """Sites add a mask; who has replied is asked for it, told who else has."""

    def exchange(self, grid, messages, server_round, phase):
        replies = list(super().exchange(grid, messages, server_round, phase))
        if phase != "train":
            return replies
        sound = {r.metadata.src_node_id: r for r in replies if not r.has_error()}
        config = ConfigRecord({"replied": sorted(sound), "server-round": server_round})
        contents = {node_id: RecordDict({"config": config}) for node_id in sound}

        def read(node_id, content):
            mask = content.array_records["mask"]["w"].numpy()
            return arrays(w=sound[node_id].content["arrays"]["w"].numpy() - mask)

        answers, missing = ask_all(
            grid, "mask", contents, read, self.run.timeout, self.inbox.site_names
        )
        for failure in missing:
            self.inbox.fail(server_round, phase, failure.site, failure.reason)
        failed = [each for each in replies if each.has_error()]
        return failed + [with_arrays(sound[a.node_id], a.value) for a in answers]


@RULES
def test_a_second_message_that_depends_on_who_answered_the_first(rule, tmp_path):
    asked = []
    app = ClientApp()

    @app.train()
    def _(message, context):
        number, server_round = number_of(context), round_of(message)
        if (number, server_round) == (3, 2):
            raise OSError("the disk is gone")
        values = {"w": message.content["arrays"]["w"].numpy()}
        masked = drift(values, number, server_round) + np.float32(64 << number)
        return reply(message, context, arrays(w=masked))

    @app.query("mask")
    def _(message, context):
        number, server_round = number_of(context), round_of(message)
        asked.append((server_round, len(message.content["config"]["replied"])))
        if (number, server_round) == (0, 3):
            raise OSError("the line is down")
        mask = arrays(w=np.full(3, 64 << number, np.float32))
        name = "mask" if (number, server_round) != (1, 3) else "other"
        return reply(message, context, None, **{name: mask})

    def left(values, message, context):
        if (number_of(context), round_of(message)) in ((0, 3), (1, 3)):
            raise OSError
        return plain(values, message, context)

    whole, _ = unbroken_and_resumed(Unmasking, rule, app, tmp_path)
    # In the second round one did not answer the first message, and is not asked the second.
    assert sorted({*asked}) == [(1, 4), (2, 3), (3, 4)]
    told = failures(whole)
    assert [each[:2] for each in told] == [(2, "site-3"), (3, "site-0"), (3, "site-1")]
    assert "the disk is gone" in told[0][2]
    assert "the line is down" in told[1][2]
    assert told[2][2] == "malformed answer: KeyError 'mask'"
    assert dump(whole.result.arrays) == expected(rule, site_app(left))


class Twice:
    """Each site is sent two messages and trains for each."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = []
        for message in super().configure_train(server_round, arrays, config, grid):
            for part in (0, 1):
                own = ConfigRecord({**message.content["config"], "part": part})
                content = RecordDict({"arrays": arrays, "config": own})
                messages.append(Message(content, message.metadata.dst_node_id, "train"))
        return messages


@RULES
def test_two_replies_of_one_site_in_one_step(rule, tmp_path):
    app = ClientApp()

    @app.train()
    def _(message, context):
        number, server_round = number_of(context), round_of(message)
        part = int(message.content["config"]["part"])
        if (number, part, server_round) == (3, 1, 2):
            raise OSError("the disk is gone")
        values = {"w": message.content["arrays"]["w"].numpy()}
        new = drift(values, 2 * number + part, server_round)
        wrong = (number, part, server_round) == (0, 1, 3)
        return reply(message, context, arrays(w=new[:2] if wrong else new))

    def single(values, message, context):
        # As many sites as there are messages, each of which does one part.
        number, server_round = number_of(context), round_of(message)
        if (number, server_round) in ((7, 2), (1, 3)):
            raise OSError
        return {"w": drift(values, number, server_round)}, {}

    whole, _ = unbroken_and_resumed(Twice, rule, app, tmp_path)
    assert [(each.round, each.site) for each in whole.history.failures] == [
        (2, "site-3"),
        (3, "site-0"),
    ]
    assert whole.history.failures[1].reason == "w is float32[2] instead of float32[3]"
    other = made_of(None, rule)
    run(other, site_app(single), INITIAL, ROUNDS, 2 * SITES)
    assert dump(whole.result.arrays) == dump(other.result.arrays)


class InEightBits:
    """Sites send the model as whole numbers of 8 bits and the step between them."""

    def reply_layout(self, sent):
        return arrays(w=np.zeros(sent["w"].shape, np.int8), step=np.float32(0))

    def decode(self, record):
        step = record["step"].numpy()
        if not step > 0:
            raise ValueError(f"step must be above 0, got {step}")
        return arrays(w=record["w"].numpy() * step)


@RULES
def test_replies_of_eight_bits(rule, tmp_path):
    def coded(values, message, context):
        new = drift(values, number_of(context), round_of(message))
        step = np.float32(np.abs(new).max() / 127)
        return np.rint(new / step).astype(np.int8), step

    app = ClientApp()

    @app.train()
    def _(message, context):
        number, server_round = number_of(context), round_of(message)
        if (number, server_round) == (3, 2):
            raise OSError("the disk is gone")
        values = {"w": message.content["arrays"]["w"].numpy()}
        new, step = coded(values, message, context)
        if (number, server_round) == (0, 3):
            new = new.astype(np.float32)
        if (number, server_round) == (1, 3):
            step = np.float32(0)
        return reply(message, context, arrays(w=new, step=step))

    def rounded(values, message, context):
        if (number_of(context), round_of(message)) in ((3, 2), (0, 3), (1, 3)):
            raise OSError
        new, step = coded(values, message, context)
        return {"w": new * step}, {}

    whole, _ = unbroken_and_resumed(InEightBits, rule, app, tmp_path)
    assert [each[:2] for each in failures(whole)] == [(2, "site-3"), (3, "site-0"), (3, "site-1")]
    assert failures(whole)[1][2] == "w is float32[3] instead of int8[3]"
    assert failures(whole)[2][2] == "step must be above 0, got 0.0"
    assert dump(whole.result.arrays) == expected(rule, site_app(rounded))


class Controlled:
    """Sites are sent a control beside the model, and send it back changed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.companions = {"control": arrays(c=np.zeros(3, np.float32))}


@RULES
def test_an_array_beside_the_model_that_comes_back_changed(rule, tmp_path):
    app = ClientApp()

    @app.train()
    def _(message, context):
        number, server_round = number_of(context), round_of(message)
        if (number, server_round) == (3, 2):
            raise OSError("the disk is gone")
        values = {"w": message.content["arrays"]["w"].numpy()}
        control = message.content["control"]["c"].numpy()
        # The control has a part in training: the next model depends on it.
        new = drift(values, number, server_round) + control
        after = control + np.float32(number)
        if (number, server_round) == (0, 3):
            after = after * np.float32(np.nan)
        more = {"control": arrays(c=after)} if (number, server_round) != (1, 3) else {}
        return reply(message, context, arrays(w=new), **more)

    controls = [0.0, 1.5, 2.5]

    def single(values, message, context):
        number, server_round = number_of(context), round_of(message)
        if (number, server_round) in ((3, 2), (0, 3), (1, 3)):
            raise OSError
        control = np.float32(controls[server_round - 1])
        return {"w": drift(values, number, server_round) + control}, {}

    whole, resumed = unbroken_and_resumed(Controlled, rule, app, tmp_path)
    reasons = {each.site: each.reason for each in whole.history.failures if each.round == 3}
    assert reasons["site-1"] == "the reply has no array record control"
    assert reasons["site-0"] == "c holds NaN or infinite values"
    assert dump(whole.result.arrays) == expected(rule, site_app(single))
    for strategy in (whole, resumed):
        # Means of 0..3, of 0..2 and of 2 and 3 on top of each other.
        assert strategy.current_companions["control"]["c"].numpy().tolist() == [5.0] * 3


def beside(message, context):
    """A site that makes the model of the control, and counts the control up."""
    control = message.content["control"]["c"].numpy()
    model = arrays(w=control[:3] + np.float32(number_of(context)))
    return reply(message, context, model, control=arrays(c=control + np.float32(1)))


def controlled_app():
    app = ClientApp()
    app.train()(beside)
    return app


def test_a_run_that_starts_afresh_has_the_first_companions():
    strategy, models = made_of(Controlled, FedAvg), []
    for _ in range(2):
        run(strategy, controlled_app(), INITIAL, ROUNDS, SITES)
        models.append(dump(strategy.result.arrays))
    assert models[0] == models[1]
    assert strategy.companions["control"]["c"].numpy().tolist() == [0.0] * 3


class Longer(FedAvg):
    """Whose companion has an entry of the model's name, of another shape."""

    def __init__(self, *args, size=5, **kwargs):
        super().__init__(*args, fraction_evaluate=0.0, **kwargs)
        self.companions = {"control": arrays(c=np.zeros(3), w=np.zeros(size, np.float32))}


def test_a_companion_of_another_shape_than_the_model_is_gone_on_with(tmp_path):
    app = ClientApp()

    @app.train()
    def _(message, context):
        return reply(message, context, INITIAL, control=message.content["control"])

    run(Longer(run_dir=tmp_path), app, INITIAL, 1, SITES)
    resumed = Longer(run_dir=tmp_path, resume=True)
    run(resumed, app, INITIAL, 2, SITES)
    assert resumed.current_companions["control"]["w"].numpy().shape == (5,)
    with pytest.raises(ValueError, match="the companion control in the checkpoint has other keys"):
        run(Longer(run_dir=tmp_path, resume=True, size=4), app, INITIAL, 3, SITES)


def test_what_a_companion_would_tell_has_no_noise():
    strategy = DPFedAvg(noise_multiplier=1.0, clipping_norm=1.0, population_size=4)
    strategy.companions = {"control": ArrayRecord()}
    with pytest.raises(ValueError, match="got control: they would leave without noise"):
        run(strategy, site_app(plain), INITIAL, 1, SITES)


# --- Settings of each hospital ------------------------------------------------------------------


class OwnRates(FedAvg):
    """Sends each site a learning rate of its own, for training and evaluation."""

    def configure_train(self, server_round, arrays, config, grid):
        return self._with_rates(super().configure_train(server_round, arrays, config, grid))

    def configure_evaluate(self, server_round, arrays, config, grid):
        return self._with_rates(super().configure_evaluate(server_round, arrays, config, grid))

    def _with_rates(self, messages):
        messages = list(messages)
        self.sent = messages
        for message in messages:
            message.content["config"]["lr"] = float(message.metadata.dst_node_id)
        return messages


@pytest.mark.parametrize("companions", [{}, {"c": arrays(c=np.ones(2, np.float32))}])
def test_a_setting_of_one_message_reaches_one_site(companions):
    rates = []

    def train(values, message, context):
        rates.append((context.node_id, message.content["config"]["lr"]))
        return values, {}

    def evaluate(values, message, context):
        rates.append((context.node_id, message.content["config"]["lr"]))
        return {}, {}

    strategy = OwnRates()
    strategy.companions = companions
    run(strategy, site_app(train, evaluate), INITIAL, rounds=2, sites=3)
    assert len(rates) == 12
    assert all(node_id == rate for node_id, rate in rates)
    first, *others = (message.content["arrays"]["w"] for message in strategy.sent)
    assert len(others) == 2
    assert all(other.data is first.data for other in others)
