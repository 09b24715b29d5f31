"""Downloads are served by a local server; nothing here needs the network."""

import hashlib
import io
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from fedmed_flower.data import sources
from fedmed_flower.data.download import SourceUnavailable
from fedmed_flower.data.site import GENERATED
from fedmed_flower.data.sources import load_dataset, load_heart_disease, load_medmnist
from fedmed_flower.errors import InputError

ROWS = {"train": 4, "val": 2, "test": 3}


def arrays(**changes):
    rng = np.random.default_rng(0)
    content = {}
    for split, n in ROWS.items():
        content[f"{split}_images"] = rng.integers(0, 256, (n, 20, 24), dtype=np.uint8)
        content[f"{split}_labels"] = (np.arange(n, dtype=np.uint8) % 2)[:, None]
    content |= changes
    return {name: array for name, array in content.items() if array is not None}


def npz(**changes):
    file = io.BytesIO()
    np.savez(file, **arrays(**changes))
    return file.getvalue()


BODY = npz()
MD5 = hashlib.md5(BODY).hexdigest()


class Publisher(BaseHTTPRequestHandler):
    asked: list[str]
    done: threading.Event

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/hang":
            self.done.wait(20)
            return
        self.send_response(500 if self.path == "/error" else 200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        if self.path == "/whole":
            self.wfile.write(BODY)
        elif self.path == "/slow":
            for start in range(0, len(BODY), 1024):
                time.sleep(0.3)
                self.wfile.write(BODY[start : start + 1024])
        else:
            self.wfile.write(BODY[: len(BODY) // 2])
        if self.path == "/stall":
            self.done.wait(20)

    def log_message(self, *_):
        pass


@pytest.fixture
def publisher(monkeypatch, tmp_path):
    """Make a publisher of BreastMNIST; ``publisher(path)`` says which of its habits it shows."""
    handler = type("Handler", (Publisher,), {"asked": [], "done": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("FEDMED_DATA", raising=False)
    monkeypatch.setenv("FEDMED_CACHE", str(tmp_path / "cache"))

    def publish(path, md5=MD5, port=server.server_port):
        file = sources.MEDMNIST["breastmnist"]
        changed = file._replace(url=f"http://127.0.0.1:{port}{path}", md5=md5)
        monkeypatch.setitem(sources.MEDMNIST, "breastmnist", changed)
        return handler.asked

    yield publish
    handler.done.set()
    server.shutdown()
    server.server_close()
    thread.join()


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").glob("**/*"))


def test_a_download_is_kept_and_asked_for_once(publisher, tmp_path, caplog):
    asked = publisher("/whole")
    with caplog.at_level("INFO", logger="flwr.fedmed"):
        splits = load_medmnist("breastmnist")
    assert {split: len(rows) for split, rows in splits.images.items()} == ROWS
    sha256 = hashlib.sha256(BODY).hexdigest()
    assert splits.source == f"BreastMNIST (MedMNIST v2), sha256 {sha256[:12]}…"
    assert not splits.generated
    assert f"sha256 {sha256}, the publisher's checksum" in caplog.text
    assert load_medmnist("breastmnist") is splits
    assert asked == ["/whole"]
    assert cached(tmp_path) == ["breastmnist.npz"]


def test_a_cached_file_needs_no_network(publisher, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/breastmnist.npz").write_bytes(BODY)
    publisher("/whole", port=closed_port())
    assert len(load_medmnist("breastmnist").labels["train"]) == 4


def test_a_spoilt_cached_file_is_downloaded_again(publisher, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/breastmnist.npz").write_bytes(BODY[:-9])
    publisher("/whole")
    load_medmnist("breastmnist")
    assert (tmp_path / "cache/breastmnist.npz").read_bytes() == BODY


def test_a_slow_download_may_take_longer_than_the_timeout(publisher):
    publisher("/slow")
    begin = time.monotonic()
    load_medmnist("breastmnist", timeout=0.9)
    assert time.monotonic() - begin > 0.9


def test_a_wrong_checksum_names_file_sums_and_remedy(publisher, tmp_path):
    publisher("/whole", md5="0" * 32)
    with pytest.raises(InputError) as caught:
        load_medmnist("breastmnist")
    text = str(caught.value)
    assert not isinstance(caught.value, SourceUnavailable)
    for part in ("breastmnist.npz", "0" * 32, MD5, "FEDMED_DATA"):
        assert part in text
    assert cached(tmp_path) == []


# The thread that waits for a silent server outlives the download, with its socket.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/half", r"ChunkedEncodingError|md5"),
        ("/error", "HTTP 500"),
        ("/hang", "TimeoutError|ReadTimeout"),
        ("/stall", "TimeoutError|ConnectionError"),
    ],
)
def test_no_answer_is_told_in_one_line_and_leaves_nothing(publisher, tmp_path, path, reason):
    publisher(path)
    begin = time.monotonic()
    with pytest.raises(SourceUnavailable, match=reason) as caught:
        load_medmnist("breastmnist", timeout=1)
    assert time.monotonic() - begin < 2.5
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("BreastMNIST (MedMNIST v2): no download from http://127.0.0.1")
    assert "put breastmnist.npz into a folder and set FEDMED_DATA to that folder" in text
    assert text.endswith('or choose dataset="phantoms"')
    assert cached(tmp_path) == []


def test_a_closed_port_is_unavailable(publisher, tmp_path):
    publisher("/whole", port=closed_port())
    with pytest.raises(SourceUnavailable, match="ConnectionError"):
        load_medmnist("breastmnist", timeout=1)
    assert cached(tmp_path) == []


def test_a_socket_that_never_answers_is_unavailable(publisher):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        publisher("/whole", port=silent.getsockname()[1])
        begin = time.monotonic()
        with pytest.raises(SourceUnavailable, match=r"time-out 0\.5 s"):
            load_medmnist("breastmnist", timeout=0.5)
        assert time.monotonic() - begin < 2


def test_a_name_look_up_that_hangs_is_bounded_too(publisher, monkeypatch):
    publisher("/whole")
    answered = threading.Event()

    def look_up(*_args, **_kwargs):
        answered.wait(20)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    begin = time.monotonic()
    with pytest.raises(SourceUnavailable, match="TimeoutError"):
        load_medmnist("breastmnist", timeout=0.5)
    assert time.monotonic() - begin < 2
    answered.set()


def test_a_cache_that_is_no_folder(publisher, tmp_path):
    (tmp_path / "cache").write_text("")
    publisher("/whole")
    with pytest.raises(InputError, match="set FEDMED_CACHE to a folder that you may write to"):
        load_medmnist("breastmnist")


@pytest.mark.parametrize("place", ["medmnist/breastmnist.npz", "breastmnist.npz"])
def test_a_local_copy_is_used_as_it_is(publisher, monkeypatch, tmp_path, caplog, place):
    asked = publisher("/whole", md5="0" * 32)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(BODY)
    monkeypatch.setenv("FEDMED_DATA", str(tmp_path))
    with caplog.at_level("INFO", logger="flwr.fedmed"):
        load_medmnist("breastmnist")
    assert asked == []
    assert hashlib.sha256(BODY).hexdigest() in caplog.text
    assert "local copy, not compared with the publisher's checksum" in caplog.text


def test_a_folder_without_the_file_falls_through_to_the_download(publisher, monkeypatch, tmp_path):
    asked = publisher("/whole")
    monkeypatch.setenv("FEDMED_DATA", str(tmp_path))
    load_medmnist("breastmnist")
    assert asked == ["/whole"]


def test_fedmed_data_must_be_a_folder(publisher, monkeypatch, tmp_path):
    publisher("/whole")
    monkeypatch.setenv("FEDMED_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"FEDMED_DATA must name a folder, got .*nowhere"):
        load_medmnist("breastmnist")


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "10"])
def test_timeout_is_checked(timeout):
    with pytest.raises(InputError, match="timeout must be a finite number of seconds above 0, got"):
        load_medmnist("breastmnist", timeout=timeout)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PneumoniaMNIST", 'got "PneumoniaMNIST"; did you mean "pneumoniamnist"?'),
        ("phantom", 'got "phantom"; did you mean "phantoms"?'),
        ("xyz", 'dataset must be one of pneumoniamnist, breastmnist, phantoms, got "xyz"'),
    ],
)
def test_an_unknown_name_lists_the_known(name, text):
    with pytest.raises(InputError) as caught:
        load_dataset(name)
    assert str(caught.value).endswith(text)
    with pytest.raises(InputError, match="must be one of pneumoniamnist, breastmnist, got"):
        load_medmnist(name)


def test_load_dataset_reaches_phantoms_and_files(tmp_path):
    phantoms = load_dataset("phantoms", sizes=(3, 0, 1))
    assert (len(phantoms.images["train"]), phantoms.source) == (3, GENERATED)
    with pytest.raises(InputError, match='path must be left out with dataset="phantoms"'):
        load_dataset("phantoms", path=tmp_path)
    (tmp_path / "own.npz").write_bytes(BODY)
    # A checksum would tell who guesses the file's content whether the guess is right.
    assert load_dataset("ours", path=tmp_path / "own.npz").source == "ours (own.npz)"


def load(tmp_path, content):
    path = tmp_path / "own.npz"
    path.write_bytes(content)
    return load_medmnist("own", path=path)


def test_a_file_gives_flat_labels_and_arrays_that_cannot_be_changed(tmp_path):
    expected = arrays()
    splits = load(tmp_path, BODY)
    for split in ROWS:
        np.testing.assert_array_equal(splits.images[split], expected[f"{split}_images"])
        np.testing.assert_array_equal(splits.labels[split], expected[f"{split}_labels"][:, 0])
        assert splits.labels[split].dtype == np.int64
        with pytest.raises(ValueError, match="read-only"):
            splits.images[split][0] = 0
        with pytest.raises(ValueError, match="read-only"):
            splits.labels[split][0] = 0
    assert load(tmp_path, npz(train_labels=np.array([3, 2, 1, 0]))).labels["train"][0] == 3


def test_colour_and_empty_val_and_test_are_allowed(tmp_path):
    changes = {f"{split}_images": np.zeros((n, 4, 4, 3)) for split, n in ROWS.items()}
    changes |= {"val_images": np.zeros((0, 4, 4, 3)), "val_labels": np.zeros((0, 1), int)}
    splits = load(tmp_path, npz(**changes))
    assert splits.images["val"].shape == (0, 4, 4, 3)
    assert splits.labels["val"].shape == (0,)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"val_images": None, "test_labels": None},
            "lacks test_labels, val_images; it holds test_images, train_images, train_labels, "
            "val_labels",
        ),
        ({"val_labels": np.zeros(3, int)}, "val_images has 2 rows, val_labels has 3"),
        (
            {"train_images": np.zeros((4, 5))},
            "train_images must have shape (n, H, W) or (n, H, W, C), got (4, 5)",
        ),
        (
            {"train_images": np.zeros((4, 0, 5))},
            "train_images must have shape (n, H, W) or (n, H, W, C), got (4, 0, 5)",
        ),
        ({"train_images": np.full((4, 5, 6), "x")}, "train_images must hold numbers, got <U1"),
        (
            {"test_images": np.zeros((3, 7, 6), np.uint8)},
            "test_images must be uint8 (20, 24) an image, as train_images, got uint8 (7, 6)",
        ),
        (
            {f"{s}_images": np.full((n, 5, 6), np.nan) for s, n in ROWS.items()},
            "train_images holds NaN or infinite values",
        ),
        (
            {"train_images": np.zeros((0, 20, 24), np.uint8), "train_labels": np.zeros(0, int)},
            "train_images must hold at least 1 image",
        ),
        ({"test_labels": np.zeros(3)}, "test_labels must be integers, got float64"),
        ({"test_labels": np.array([0, -2, 1])}, "test_labels must be 0 or greater, got -2"),
        ({"test_labels": np.zeros((3, 2), int)}, "must have shape (n,) or (n, 1), got (3, 2)"),
        ({"test_labels": np.array(1)}, "must have shape (n,) or (n, 1), got ()"),
        ({"train_labels": np.array([{}] * 4)}, "not a complete npz file without pickled objects"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, changes, text):
    with pytest.raises(InputError) as caught:
        load(tmp_path, npz(**changes))
    assert str(caught.value).startswith(f"{tmp_path}/own.npz: ")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"image,label\n", BODY[:40], BODY[:-30], BODY[60:]])
def test_a_broken_file_is_named(tmp_path, content):
    with pytest.raises(InputError, match=r"own.npz: not a complete npz file"):
        load(tmp_path, content)


def test_a_changed_byte_in_an_image_is_noticed(tmp_path):
    image = arrays()["train_images"].tobytes()
    at = BODY.index(image) + 7
    with pytest.raises(InputError, match=r"not a complete npz file .*BadZipFile"):
        load(tmp_path, BODY[:at] + bytes([BODY[at] ^ 1]) + BODY[at + 1 :])


def test_a_single_npy_array_is_not_an_npz(tmp_path):
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="not a complete npz file"):
        load(tmp_path, file.getvalue())


def test_a_path_without_a_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing.npz: cannot be read \(FileNotFoundError\)"):
        load_medmnist("own", path=tmp_path / "nothing.npz")
    with pytest.raises(InputError, match=r"cannot be read \(IsADirectoryError\)"):
        load_medmnist("own", path=tmp_path)


def test_a_file_is_read_once_and_again_where_it_has_changed(tmp_path):
    first = load(tmp_path, BODY)
    assert load_medmnist("own", path=tmp_path / "own.npz") is first
    changed = npz(train_labels=np.array([1, 1, 1, 1]))
    assert load(tmp_path, changed).labels["train"].tolist() == [1, 1, 1, 1]


HEART_LINE = "63.0,1.0,1.0,145.0,?,1.0,2.0,150.0,0.0,.7,3.0,0.0,6.0,"


@pytest.fixture
def heart(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDMED_DATA", str(tmp_path))

    def write(cleveland):
        for name in sources.HEART:
            text = cleveland if name == "cleveland" else HEART_LINE + "1\n"
            (tmp_path / f"processed.{name}.data").write_text(text)
        return load_heart_disease()

    return write


def test_heart_disease_reads_question_marks_as_nan(heart):
    tables = heart(HEART_LINE + "0\n" + HEART_LINE + "4\n")
    assert list(tables) == ["cleveland", "hungarian", "switzerland", "va"]
    table = tables["cleveland"]
    assert (table.hospital, table.features.shape) == ("cleveland", (2, 13))
    assert table.target.tolist() == [0, 1]
    column = sources.HEART_FEATURES.index("chol")
    assert np.argwhere(np.isnan(table.features)).tolist() == [[0, column], [1, column]]
    assert table.features[0, sources.HEART_FEATURES.index("oldpeak")] == 0.7
    assert table.source.startswith("UCI Heart Disease, cleveland, sha256 ")
    assert not table.features.flags.writeable


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "holds no rows"),
        (HEART_LINE + "0\n1,2\n", "line 2 must hold 14 values, .* got 2, the last 2"),
        (HEART_LINE + "?\n", "line 1 must hold 14 values, .* got 14, the last nan"),
        (HEART_LINE + "5\n", "line 1 must hold .* from 0 to 4, got 14, the last 5"),
        (HEART_LINE + "x\n", "line 1: could not convert string to float: 'x'"),
    ],
)
def test_heart_disease_names_a_wrong_line(heart, text, error):
    with pytest.raises(InputError, match=f"processed.cleveland.data: {error}"):
        heart(text)


def test_heart_disease_does_not_offer_phantoms(publisher, monkeypatch):
    publisher("/whole")
    url = f"http://127.0.0.1:{closed_port()}/"
    changed = sources.HEART["cleveland"]._replace(url=url)
    monkeypatch.setitem(sources.HEART, "cleveland", changed)
    with pytest.raises(SourceUnavailable, match=r"put processed\.cleveland\.data into") as caught:
        load_heart_disease(timeout=1)
    assert "phantoms" not in str(caught.value)


@pytest.mark.realdata
def test_the_real_files_have_the_published_sizes():
    pneumonia, breast = load_dataset("pneumoniamnist"), load_dataset("breastmnist")
    assert [len(rows) for rows in pneumonia.labels.values()] == [4708, 524, 624]
    assert [len(rows) for rows in breast.labels.values()] == [546, 78, 156]
    assert pneumonia.images["train"].shape == (4708, 28, 28)
    assert np.bincount(pneumonia.labels["train"]).tolist() == [1214, 3494]
    tables = load_heart_disease()
    assert [len(table.target) for table in tables.values()] == [303, 294, 123, 200]
    assert [int(table.target.sum()) for table in tables.values()] == [139, 106, 115, 149]
