import copy
import logging
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import ClientAppException
from flwr.common.constant import ErrorCode
from flwr.serverapp import ServerApp
from tiny import CONFIG, TinyClient, bits, linear, model_arrays, says

from fedmed_flower import InputError, federate, run_local
from fedmed_flower.engines import local
from fedmed_flower.engines.answering import copy_content
from fedmed_flower.engines.local import LocalGrid
from fedmed_flower.strategies import FedAvg


def echo(message, context):
    return Message(message.content, reply_to=message)


def app_of(train=echo):
    app = ClientApp()
    app.train()(train)
    app.evaluate()(echo)
    return app


def serve(work, train=echo, num_sites=2, **options):
    """Run `work(grid, context)` as a server whose clients have this train function."""
    server, results = ServerApp(), []

    @server.main()
    def main(grid, context):
        results.append(work(grid, context))

    run_local(server, app_of(train), num_sites, **options)
    return results[0]


def content_of(**values):
    return RecordDict(
        {
            "config": ConfigRecord({"letters": ["a", "b"], **values}),
            "arrays": ArrayRecord({"w": Array(np.arange(3.0))}),
            "metrics": MetricRecord({"numbers": [1, 2]}),
        }
    )


def to_all(grid, content=None, kind="train", **options):
    """Send one content object to all sites, as Flower's strategies do."""
    content = content_of() if content is None else content
    messages = [Message(content, node_id, kind) for node_id in grid.get_node_ids()]
    return list(grid.send_and_receive(messages, **options))


def spoil(message, context):
    """Report what came, and change it in place in every way."""
    content, config = message.content, message.content["config"]
    seen = {
        "letters": list(config["letters"]),
        "keys": sorted(config),
        "numbers": [str(n) for n in content["metrics"]["numbers"]],
        "records": sorted(content),
        "weights": [str(w) for w in content["arrays"]["w"].numpy()],
        "arrays": list(content["arrays"]),
    }
    config["letters"].append("c")
    config["extra"] = 1
    content["metrics"]["numbers"].clear()
    content["arrays"]["w"].data = Array(np.zeros(3)).data
    content["arrays"]["more"] = Array(np.zeros(1))
    content["new"] = ConfigRecord()
    context.run_config["rate"] = 2.0
    context.node_config["partition-id"] = 7
    reply = RecordDict({"seen": ConfigRecord(seen)})
    return Message(reply, reply_to=message)


def test_what_one_client_changes_in_place_reaches_neither_the_next_nor_the_server():
    contents = [content_of()]

    def work(grid, context):
        replies = to_all(grid, contents[0]) + to_all(grid, contents[0])
        assert context.run_config == {"rate": 1.0}
        return [dict(reply.content["seen"]) for reply in replies]

    run_config = {"rate": 1.0}
    seen = serve(work, spoil, num_sites=2, run_config=run_config)
    assert seen == 4 * [
        {
            "letters": ["a", "b"],
            "keys": ["letters"],
            "numbers": ["1", "2"],
            "records": ["arrays", "config", "metrics"],
            "weights": ["0.0", "1.0", "2.0"],
            "arrays": ["w"],
        }
    ]
    assert run_config == {"rate": 1.0}
    assert list(contents[0]) == ["config", "arrays", "metrics"]
    assert dict(contents[0]["config"]) == {"letters": ["a", "b"]}
    assert contents[0]["arrays"]["w"].numpy().tolist() == [0.0, 1.0, 2.0]


def test_node_and_run_config_are_as_given_in_every_message():
    def train(message, context):
        record = ConfigRecord({**context.node_config, **context.run_config})
        context.node_config["partition-id"] = 7
        context.run_config["rate"] = 2.0
        return Message(RecordDict({"config": record}), reply_to=message)

    def work(grid, context):
        return [dict(reply.content["config"]) for _ in (1, 2) for reply in to_all(grid)]

    seen = serve(work, train, run_config={"rate": 1.0}, node_configs=[{}, {"site-name": "b"}])
    first = {"partition-id": 0, "num-partitions": 2, "rate": 1.0}
    second = {"partition-id": 1, "num-partitions": 2, "rate": 1.0, "site-name": "b"}
    assert seen == [first, second, first, second]


def test_node_configs_stand_above_the_partition():
    def train(message, context):
        return Message(RecordDict({"c": ConfigRecord(context.node_config)}), reply_to=message)

    def work(grid, context):
        return dict(to_all(grid)[0].content["c"])

    node_config = {"partition-id": 3, "num-partitions": 9}
    assert serve(work, train, num_sites=1, node_configs=[node_config]) == node_config


def test_the_order_of_records_is_kept():
    def work(grid, context):
        return [list(reply.content) for reply in to_all(grid)]

    def train(message, context):
        return Message(RecordDict(dict(message.content.items())), reply_to=message)

    assert serve(work, train) == 2 * [["config", "arrays", "metrics"]]


def test_a_copy_is_equal_and_shares_nothing_that_can_change():
    content = content_of()
    copied = copy_content(content)
    assert list(copied) == list(content)
    assert copied == content
    for name in content:
        assert copied[name] is not content[name]
    assert copied["arrays"]["w"] is not content["arrays"]["w"]
    assert copied["arrays"]["w"].data is content["arrays"]["w"].data
    assert copied["config"]["letters"] is not content["config"]["letters"]


def test_a_server_that_changes_a_reply_does_not_reach_into_a_clients_state():
    def train(message, context):
        counts = context.state.setdefault("counts", MetricRecord({"n": [1]}))
        return Message(RecordDict({"counts": counts}), reply_to=message)

    def work(grid, context):
        for reply in to_all(grid):
            reply.content["counts"]["n"].append(2)
        return [list(reply.content["counts"]["n"]) for reply in to_all(grid)]

    assert serve(work, train) == [[1], [1]]


def test_a_message_is_what_it_was_when_it_was_pushed():
    def work(grid, context):
        content = content_of()
        ids = list(grid.push_messages([Message(content, n, "train") for n in grid.get_node_ids()]))
        content["config"]["letters"].append("c")
        replies = list(grid.pull_messages(ids))
        return [list(reply.content["config"]["letters"]) for reply in replies]

    assert serve(work) == [["a", "b"], ["a", "b"]]


def count_up(message, context):
    """Count this client's messages in its state; fail where the message says so."""
    record = context.state.setdefault("count", MetricRecord({"n": 0, "list": [0]}))
    record["n"] += 1
    record["list"].append(record["n"])
    if message.content["config"].get("fail"):
        raise OSError("no disk")
    return Message(RecordDict({"count": MetricRecord(dict(record))}), reply_to=message)


def test_state_lasts_over_rounds_and_is_each_clients_own():
    def work(grid, context):
        one, _ = grid.get_node_ids()
        list(grid.send_and_receive([Message(content_of(), one, "train")]))
        return [(r.content["count"]["n"], list(r.content["count"]["list"])) for r in to_all(grid)]

    assert serve(work, count_up) == [(2, [0, 1, 2]), (1, [0, 1])]


def test_changes_of_the_state_are_dropped_where_the_client_raises():
    def work(grid, context):
        to_all(grid)
        assert all(reply.has_error() for reply in to_all(grid, content_of(fail=True)))
        return [(r.content["count"]["n"], list(r.content["count"]["list"])) for r in to_all(grid)]

    assert serve(work, count_up, num_sites=1) == [(2, [0, 1, 2])]


def test_states_can_be_taken_out_and_put_back():
    def work(grid, context):
        to_all(grid)
        states = grid.export_states()
        to_all(grid)
        grid.import_states(states | {"9": b""})
        return [reply.content["count"]["n"] for reply in to_all(grid)]

    assert serve(work, count_up) == [2, 2]
    assert serve(lambda grid, _: grid.export_states()) == {}


class OddError(Exception):
    def __str__(self):
        return "odd <'text'>"


ERRORS = [ValueError("boom"), OddError(), KeyError("label"), AssertionError(), StopIteration(3)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_client_that_raises_becomes_flowers_error_reply(error):
    def train(message, context):
        raise error

    reply, _ = serve(lambda grid, _: to_all(grid), train)
    # Flower's worker writes str(type(ex)) + ":<'" + str(ex) + "'>" of a ClientAppException(str).
    assert reply.error.reason == (
        "<class 'flwr.clientapp.client_app.ClientAppException'>:<'\n"
        f"Exception ClientAppException occurred. Message: {error}'>"
    )
    assert reply.error.reason == f"{ClientAppException}:<'{ClientAppException(str(error))}'>"
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert reply.metadata.message_type == "train"


def test_a_function_that_the_client_does_not_have():
    first, _ = serve(lambda grid, _: to_all(grid, kind="query.describe"))
    assert "No query function registered with name 'describe'" in first.error.reason


def engines_answer(grid):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.05)
    (reply,) = grid.send_and_receive([Message(content_of(), nodes[0], "train")], timeout=600)
    return reply.error.code, reply.error.reason


@pytest.mark.slow
def test_the_error_reply_is_the_one_of_flowers_engine(monkeypatch):
    from flwr.simulation import run_simulation

    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONBREAKPOINT", "")  # Ray sets it; this puts it back.
    server, answers = ServerApp(), []

    @server.main()
    def main(grid, context):
        answers.append(engines_answer(grid))

    def train(message, context):
        raise ValueError(f"boom at site {context.node_config['partition-id']}")

    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(
        server,
        app_of(train),
        1,
        backend_config={"client_resources": resources, "init_args": {"num_cpus": 1}},
    )
    run_local(server, app_of(train), 1)
    (engine_code, engine_reason), (code, reason) = answers
    assert code == engine_code
    # Ray puts its traceback in front; from the exception on the texts are the same.
    mark = "\nException ClientAppException occurred. Message: boom at site 0'>"
    assert reason.endswith(mark)
    assert engine_reason.endswith(mark)
    assert "ClientAppException)'>:<'" in engine_reason
    assert reason.removesuffix(mark) == "<class 'flwr.clientapp.client_app.ClientAppException'>:<'"


def test_a_client_that_returns_nothing_does_not_reply():
    def train(message, context):
        context.state["kept"] = ConfigRecord({"n": 1})
        return None

    def work(grid, context):
        return to_all(grid), set(grid.export_states())

    replies, states = serve(work, train)
    assert replies == []
    assert len(states) == 2


def test_a_client_that_returns_no_message_does_not_end_the_run():
    replies = serve(lambda grid, _: to_all(grid), lambda message, context: message.content)
    assert all(reply.has_error() for reply in replies)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_through(error):
    def train(message, context):
        raise error

    with pytest.raises(error):
        serve(lambda grid, _: to_all(grid), train)


def test_an_error_of_the_server_passes_through():
    def work(grid, context):
        raise InputError("no such dataset")

    with pytest.raises(InputError, match=says("no such dataset")):
        serve(work)


def test_the_timeout_is_each_sites_own_time(monkeypatch):
    # Seconds at the start and the end of each site.
    clock = iter([0.0, 9.0, 9.0, 20.0, 20.0, 29.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    ran = []

    def train(message, context):
        ran.append(context.node_config["partition-id"])
        return echo(message, context)

    def work(grid, context):
        return [reply.metadata.src_node_id for reply in to_all(grid, timeout=10)]

    replied = serve(work, train, num_sites=3)
    assert ran == [0, 1, 2]
    assert [node_id - replied[0] for node_id in replied] == [0, 2]


@pytest.mark.parametrize("where", ["metrics", "state"])
def test_an_integer_that_flower_cannot_send_is_an_error_of_its_site(where):
    def train(message, context):
        if context.node_config["partition-id"] == 0:
            content = echo(message, context).content
            if where == "state":
                context.state["kept"] = ConfigRecord({"n": 2**64})
            else:
                content["metrics"] = MetricRecord({"n": 2**64})
            return Message(content, reply_to=message)
        return echo(message, context)

    def work(grid, context):
        return to_all(grid), grid.export_states()

    replies, _ = serve(work, train)
    assert [reply.has_error() for reply in replies] == [True, False]
    assert "n is an integer beyond 64 bits" in replies[0].error.reason


def test_a_message_that_timed_out_is_gone():
    def work(grid, context):
        content = content_of()
        messages = [Message(content, node_id, "train") for node_id in grid.get_node_ids()]
        assert list(grid.send_and_receive(messages, timeout=-1)) == []
        return list(grid.pull_messages([m.metadata.message_id for m in messages]))

    assert serve(work) == []


def test_replies_can_be_pulled_once():
    def work(grid, context):
        node_ids = list(grid.get_node_ids())
        ids = list(
            grid.push_messages(
                grid.create_message(content_of(), "train", node_id, "1") for node_id in node_ids
            )
        )
        assert len(set(ids)) == 2
        replies = list(grid.pull_messages([ids[1], "unknown"]))
        assert [reply.metadata.src_node_id for reply in replies] == node_ids[1:]
        assert [reply.metadata.reply_to_message_id for reply in replies] == ids[1:]
        return [len(list(grid.pull_messages(ids))) for _ in (1, 2)]

    assert serve(work) == [1, 0]


def test_an_unknown_node():
    def work(grid, context):
        return list(grid.push_messages([Message(content_of(), 7, "train")]))

    with pytest.raises(ValueError, match=says("there is no node 7")):
        serve(work)


@pytest.mark.parametrize("num_sites", [0, -3])
def test_there_must_be_a_site(num_sites):
    with pytest.raises(InputError, match=says(f"num_sites must be at least 1, got {num_sites}")):
        run_local(ServerApp(), ClientApp(), num_sites)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_there_must_be_a_node_config_for_each_site(count):
    text = f"node_configs must have num_sites = 2 items, got {count}"
    with pytest.raises(InputError, match=says(text)):
        run_local(ServerApp(), ClientApp(), 2, node_configs=count * [{}])


def test_the_servers_context_comes_back():
    server = ServerApp()

    @server.main()
    def main(grid, context):
        context.state["done"] = ConfigRecord({"app": grid.run.fab_id})
        assert isinstance(grid, LocalGrid)
        assert grid.run.run_id == context.run_id

    run = run_local(server, ClientApp(), 1, run_config={"a": 1}, app_name="chest")
    assert dict(run.context.state["done"]) == {"app": "chest"}
    assert run.context.run_config == {"a": 1}
    assert (run.result, run.folder) == (None, None)


def test_the_last_strategys_result_and_folder_are_returned(tmp_path):
    server, results = ServerApp(), []

    @server.main()
    def main(grid, context):
        arrays = ArrayRecord({"w": Array(np.arange(3.0))})
        for folder in (None, tmp_path / "run"):
            results.append(FedAvg(run_dir=folder).start(grid, arrays, num_rounds=1))

    run = run_local(server, app_of(echo), 2)
    assert run.result is results[1]
    assert run.folder == tmp_path / "run"


def test_the_result_of_federate_is_returned_and_not_one_of_a_model_for_comparison(tmp_path):
    server, results = ServerApp(), []

    @server.main()
    def main(grid, context):
        results.append(federate(FedAvg(), grid, context, TinyClient(context)))

    config = CONFIG | {"run-dir": str(tmp_path / "run"), "baselines": True, "num-server-rounds": 1}
    run = run_local(server, TinyClient.client_app(), 2, run_config=config)
    assert run.result is results[0]
    assert run.folder == tmp_path / "run"


def test_every_run_has_an_id_of_its_own():
    ids = {serve(lambda _, context: context.run_id) for _ in range(3)}
    assert len(ids) == 3


def test_the_listener_is_called_before_the_first_client_and_after_each():
    told = []

    def work(grid, context):
        to_all(grid)
        to_all(grid, kind="evaluate")

    def on_message(message, done, sent):
        told.append((message.metadata.message_type, message.metadata.dst_node_id, done, sent))

    serve(work, num_sites=3, on_message=on_message)
    nodes = [(1001, 0), (1001, 1), (1002, 2), (1003, 3)]
    assert told == [(kind, *node, 3) for kind in ("train", "evaluate") for node in nodes]


def test_flowers_own_strategy_gives_the_same_model_as_a_mean_by_hand():
    server, results = ServerApp(), []
    initial = model_arrays()

    @server.main()
    def main(grid, context):
        results.append(FedAvg(seed=1).start(grid, initial, num_rounds=1))

    run_local(server, TinyClient.client_app(), 3, run_config=dict(CONFIG))
    sent = []

    def keep(grid, context):
        config = ConfigRecord({"server-round": 1})
        content = RecordDict({"arrays": initial, "config": config})
        for reply in to_all(grid, content):
            sent.append(reply.content["arrays"].to_torch_state_dict())

    again = ServerApp()
    again.main()(keep)
    run_local(again, TinyClient.client_app(), 3, run_config=dict(CONFIG))
    for key, array in results[0].arrays.items():
        mean = np.mean([state[key].double().numpy() for state in sent], axis=0)
        np.testing.assert_allclose(array.numpy(), mean, atol=1e-7)
    assert bits(initial) == bits(model_arrays())
    assert linear()[1].weight.shape == sent[0]["1.weight"].shape


def test_a_debugger_works_inside_a_client(tmp_path):
    script = tmp_path / "app.py"
    script.write_text(
        dedent(
            """
            from flwr.app import ConfigRecord, Message, RecordDict
            from flwr.clientapp import ClientApp
            from flwr.serverapp import ServerApp

            from fedmed_flower.engines.local import run_local

            client, server = ClientApp(), ServerApp()


            @client.train()
            def train(message, context):
                breakpoint()
                return Message(message.content, reply_to=message)


            @server.main()
            def main(grid, context):
                content = RecordDict({"config": ConfigRecord({"n": 41})})
                (node_id,) = grid.get_node_ids()
                (reply,) = grid.send_and_receive([Message(content, node_id, "train")])
                print("came back:", reply.has_content())


            run_local(server, client, 1)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        input='p message.content["config"]["n"]+1\nc\n',
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONBREAKPOINT"},
    )
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout
    assert "came back: True" in done.stdout


@pytest.mark.parametrize(
    ("handler", "config"),
    [
        # Opacus, which private training imports, gives the root logger a handler.
        ("", {"privacy": "patient", "sampling-rate": 0.5}),
        ("logging.warning('a line of another library')", {}),
    ],
    ids=["Opacus", "logging.warning"],
)
def test_each_line_of_a_script_comes_once_on_stderr_whoever_gives_the_root_logger_a_handler(
    handler, config, tmp_path
):
    script = tmp_path / "app.py"
    script.write_text(
        dedent(
            f"""
            import logging
            from tiny import run_tiny

            {handler}
            run_tiny("run", **{config!r})
            """
        )
    )
    helpers = str(Path(__file__).parents[1] / "helpers")
    path = os.pathsep.join([helpers, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    for text in ("round 1/2", "round 2/2", "report: ", "hospital-1: 10 train"):
        assert done.stderr.count(text) == 1, done.stderr
    # What Flower's handler leaves out does not come by the other handler.
    assert "DEBUG" not in done.stderr


def test_a_script_that_sets_the_root_logger_to_debug_sees_each_line_once(capsys):
    lines = [(logging.DEBUG, "a detail"), (logging.INFO, "a line")]
    own = logging.StreamHandler(sys.stderr)
    own.setLevel(logging.INFO)
    flower, root = logging.getLogger("flwr"), logging.getLogger()
    level = root.level
    other = logging.StreamHandler(sys.stderr)
    flower.addHandler(own)
    root.addHandler(other)
    try:
        for root_level in (logging.DEBUG, logging.WARNING):
            root.setLevel(root_level)
            for number, text in lines:
                logging.getLogger("flwr.fedmed").log(number, text)
    finally:
        root.setLevel(level)
        root.removeHandler(other)
        flower.removeHandler(own)
    shown = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("\x1b")]
    assert shown == ["a detail", "a line", "a line"]


def test_copies_of_messages_leave_the_servers_message_alone():
    def train(message, context):
        message.metadata.dst_node_id = 5
        message.content = RecordDict()
        return Message(RecordDict(), reply_to=message)

    def work(grid, context):
        messages = [Message(content_of(), node_id, "train") for node_id in grid.get_node_ids()]
        before = copy.deepcopy(messages)
        list(grid.send_and_receive(messages))
        return [
            (m.metadata.dst_node_id, list(m.content)) == (b.metadata.dst_node_id, list(b.content))
            for m, b in zip(messages, before, strict=True)
        ]

    assert serve(work, train) == [True, True]


@pytest.mark.parametrize(("verbose", "level"), [(False, 20), (True, 20), (False, 10)])
def test_flowers_own_lines_come_on_the_console_only_when_asked_for(verbose, level):
    class Kept(logging.StreamHandler):
        def emit(self, record):
            seen.append(record.getMessage())

    seen = []
    handler = Kept()
    handler.setLevel(level)
    flower = logging.getLogger("flwr")
    flower.addHandler(handler)
    server = ServerApp()

    @server.main()
    def main(grid, context):
        flower.info("Flower's line")
        flower.warning("Flower's warning")
        logging.getLogger("flwr.fedmed").info("our line")
        logging.getLogger("flwr.fedmedical").info("no line of ours")

    try:
        run_local(server, ClientApp(), 1, verbose=verbose)
        flower.info("after the run")
    finally:
        flower.removeHandler(handler)
    # A handler at DEBUG was set by somebody who wants to see all.
    every = verbose or level == logging.DEBUG
    expected = ["Flower's line", "Flower's warning", "our line", "no line of ours"]
    shown = expected if every else ["Flower's warning", "our line"]
    assert seen == [*shown, "after the run"]


def test_progress_is_shown_in_a_notebook_beside_the_listener_of_the_user(monkeypatch):
    drawn, heard = [], []

    @contextmanager
    def inline(rounds):
        yield lambda message, done, sent: drawn.append((rounds, done, sent))

    monkeypatch.setattr(local, "inline_progress", inline)
    monkeypatch.setattr(local, "in_notebook", lambda: True)
    server = ServerApp()

    @server.main()
    def main(grid, context):
        content = RecordDict({"config": ConfigRecord()})
        list(grid.send_and_receive([Message(content, n, "query.describe") for n in (1001, 1002)]))

    app = TinyClient.client_app()
    config = {"num-server-rounds": 7}
    for progress in (True, False):
        run_local(
            server,
            app,
            2,
            run_config=config,
            on_message=lambda message, done, sent: heard.append((done, sent)),
            progress=progress,
        )
    assert heard == [(0, 2), (1, 2), (2, 2)] * 2
    assert drawn == [(7, done, sent) for done, sent in heard[:3]]


def test_a_line_comes_once_although_flower_writes_to_stdout_and_the_root_logger_to_stderr():
    # As in the process of a ServerApp, beside a library that gives the root logger a handler.
    script = """
        import logging, sys
        from flwr.supercore.logger import console_handler
        import fedmed_flower.errors

        console_handler.stream = sys.stdout
        logging.basicConfig(level=logging.WARNING)
        for name in ("flwr", "flwr.fedmed"):
            logging.getLogger(name).info("a line of %s", name)
    """
    done = subprocess.run(
        [sys.executable, "-c", dedent(script)], capture_output=True, text=True, check=True
    )
    assert [done.stdout.count(f"a line of {name}") for name in ("flwr\n", "flwr.fedmed\n")] == [
        1,
        1,
    ]
    assert "a line of" not in done.stderr
