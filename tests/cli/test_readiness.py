import http.server
import shutil
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from app_bundles import bundle
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from rich.console import Console

from fedmed_flower.approval.approvals import Approvals
from fedmed_flower.cli.readiness import LOOK, OK, WRONG, Finding, findings, print_findings
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.secure.identity import Identity
from fedmed_flower.secure.study import Peers

NOW = datetime.now(UTC)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "patients.csv").write_text("patient\n")
    return tmp_path / "data"


def of(what, options):
    """Return what is found of one thing."""
    found = findings(options, None)
    return [(each.state, each.text) for each in found if each.what == what]


def node_config(**settings):
    texts = [f'{key.replace("_", "-")}="{value}"' for key, value in settings.items()]
    return ["--node-config", " ".join(texts)]


def write_certificate(path, first, last):
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "consortium CA")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(first)
        .not_valid_after(last)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return ["--root-certificates", str(path)]


@pytest.fixture
def server():
    """A server whose clock is off by so many seconds."""
    off = [0.0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def date_time_string(self, timestamp=None):
            return format_datetime(datetime.now(UTC) + timedelta(seconds=off[0]), usegmt=True)

        def do_GET(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        options = ["--insecure", "--superlink", f"127.0.0.1:{running.server_address[1]}"]
        yield options, off
        running.shutdown()
        thread.join()


def test_a_node_that_can_start(tmp_path, data, server):
    key = tmp_path / "north-key"
    private = ec.generate_private_key(ec.SECP384R1())
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    key.chmod(0o600)
    ledger = tmp_path / "ledger.sqlite"
    Ledger(ledger)
    found, content = bundle(tmp_path / "app")
    Approvals.load(tmp_path / "list").with_bundle(found, content, {}).save()
    config = f'site-name="north" data-dir="{data}" ledger="{ledger}" budget-epsilon=8.0 '
    config += "budget-delta=1e-5"
    certificate = write_certificate(tmp_path / "ca.crt", NOW, NOW + timedelta(days=365))
    options = ["--auth-supernode-private-key", str(key), "--node-config", config, *certificate]
    options += ["--superlink", server[0][-1]]
    states = {each.what: each.state for each in findings(options, tmp_path / "list")}
    # The test's server has no TLS.
    assert states.pop("server") == LOOK
    assert set(states.values()) == {OK}
    assert set(states) == {"name", "data", "apps", "ledger", "disk", "node key", "certificate"}


def test_a_node_without_anything_is_told_of_each_thing():
    found = findings([], None)
    texts = {each.what: (each.state, each.text) for each in found}
    assert texts["name"] == (WRONG, "site-name is not in the node config: the hospital has no name")
    assert texts["data"] == (LOOK, "data-dir is not in the node config")
    assert texts["apps"][0] == LOOK
    assert "whatever the server sends runs here (--approvals)" in texts["apps"][1]
    assert texts["privacy"][0] == LOOK
    assert texts["node key"][0] == LOOK


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("budget-epsilon=8.0", "needs budget-delta beside it"),
        ("min-cell-count=0", "min-cell-count must be at least 1"),
        ("site-name=north", "the node's options cannot be read"),
    ],
)
def test_a_node_config_that_means_nothing_is_wrong(config, text):
    ((state, said),) = of("node config", ["--node-config", config])
    assert state == WRONG
    assert text in said


def test_a_key_that_only_an_app_can_know_is_named():
    options = ["--node-config", 'site-name="north" data-di="/data" scanner="a"']
    found = of("node config", options)
    assert [state for state, _ in found] == [LOOK, LOOK]
    assert "the node config has an unknown key 'data-di'" in found[0][1]
    assert "data-dir" in found[0][1]
    assert found[1][1].endswith("; only an app that adds it can use it")


def test_data_that_are_not_there(tmp_path):
    ((state, text),) = of("data", node_config(site_name="a", data_dir=tmp_path / "none"))
    assert (state, text.partition(" cannot")[0]) == (WRONG, f"data-dir {tmp_path / 'none'}")
    ((state, text),) = of("data", node_config(site_name="a", data_dir=tmp_path))
    assert (state, text) == (LOOK, f"{tmp_path} is empty")


def test_a_ledger_that_is_gone_or_spent(tmp_path, data):
    gone = tmp_path / "ledger.sqlite"
    ((state, text),) = of("ledger", node_config(site_name="a", ledger=gone))
    assert state == WRONG
    assert "there is no ledger" in text
    ((state, text),) = of("ledger", node_config(site_name="a", data_dir=data))
    assert state == LOOK
    assert "will be made: nothing was ever released" in text
    ledger = Ledger(gone)
    ledger.charge(["p"], (1.0, 1.0), 100, run="r", purpose="train")
    config = f'site-name="a" ledger="{gone}" budget-epsilon=1.0 budget-delta=1e-5'
    ((state, text),) = of("ledger", ["--node-config", config])
    assert state == LOOK
    assert f"epsilon {ledger.most(1e-5):.2f} of 1 is spent" in text


def test_secure_keys_that_do_not_fit_together(tmp_path):
    key = tmp_path / "north.key"
    north = Identity.create(key, "north")
    others = [Identity.simulated(name, "run") for name in ("a", "b", "c", "d")]
    members = {each.name: each.public for each in others}
    peers = tmp_path / "peers.toml"
    Peers("lungs", {**members, "north": Identity.simulated("north", "run").public}).save(peers)
    ((state, text),) = of("secure sums", node_config(site_name="a", secure_key=key))
    assert (state, "belong together" in text) == (WRONG, True)
    both = node_config(site_name="a", secure_key=key, secure_peers=peers)
    ((state, text),) = of("secure sums", both)
    assert (state, "pins another key for north" in text) == (WRONG, True)
    Peers("lungs", {**members, "north": north.public}).save(peers)
    ((state, text),) = of("secure sums", both)
    assert (state, text.startswith("north in the study lungs, ")) == (OK, True)


def test_a_node_key_that_flower_does_not_take(tmp_path):
    key = tmp_path / "key"
    options = ["--auth-supernode-private-key", str(key)]
    assert "cannot be read" in of("node key", options)[0][1]
    key.write_text("-----BEGIN PRIVATE KEY-----")
    assert "is no key that Flower takes: make one with ssh-keygen" in of("node key", options)[0][1]


@pytest.mark.parametrize(
    ("days", "state", "text"),
    [
        ((-400, -35), WRONG, "ended on"),
        ((1, 300), WRONG, "is this machine's clock right?"),
        ((-1, 10), LOOK, "holds until"),
        ((-1, 300), OK, "holds until"),
    ],
)
def test_dates_of_the_certificate(tmp_path, days, state, text):
    first, last = (NOW + timedelta(days=each) for each in days)
    ((found, said),) = of("certificate", write_certificate(tmp_path / "ca.crt", first, last))
    assert found == state
    assert text in said


def test_a_connection_without_tls_is_wrong_and_a_file_without_certificate(tmp_path):
    assert of("certificate", ["--insecure", "--superlink", "192.0.2.1:9092"])[0][0] == WRONG
    for near in ("127.0.0.1:9092", "localhost:9092", "[::1]:9092"):
        assert of("certificate", ["--insecure", "--superlink", near])[0][0] == LOOK
    (tmp_path / "ca.crt").write_text("none")
    ((state, text),) = of("certificate", ["--root-certificates", str(tmp_path / "ca.crt")])
    assert (state, "holds no certificate" in text) == (WRONG, True)


@pytest.mark.parametrize(
    ("off", "state", "text"),
    [
        (0, OK, "agrees with the server's"),
        (200, OK, "agrees with the server's"),
        (-600, WRONG, "s ahead of the server"),
        (600, WRONG, "s behind the server"),
    ],
)
def test_the_clock_beside_the_servers(server, off, state, text):
    options, seconds = server
    seconds[0] = off
    assert of("server", options) == [(OK, f"{options[-1]} answers")]
    ((found, said),) = of("clock", options)
    assert found == state
    assert text in said


def test_a_server_that_does_not_answer_is_no_reason_not_to_start():
    ((state, text),) = of("server", ["--insecure", "--superlink", "127.0.0.1:1"])
    assert state == LOOK
    assert "does not answer" in text
    assert "goes on trying" in text


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**12, 10**12, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    found = of("disk", node_config(site_name="a", output_dir=tmp_path / "out"))
    assert [state for state, _ in found] == [LOOK, LOOK]
    assert found[1][1] == f"output-dir {tmp_path / 'out'}: 1.0 GB are free"


def test_the_table_names_state_and_thing():
    console = Console(width=100, record=True)
    print_findings(console, [Finding("data", "a\nb", LOOK)])
    assert "look" in (text := console.export_text())
    assert "a b" in text
