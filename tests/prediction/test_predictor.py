"""What predictor.zip holds, who writes it, and what a stranger's file can do."""

import json
import random
import zipfile

import numpy as np
import pytest
import torch
from flwr.serverapp import ServerApp
from predicting import fedmed, lines_of, predict, run_and_forget, write_app
from safetensors.torch import load_file, save
from tables import TinyTable, patients, run_tables
from tiny import CONFIG, TinyClient, fixed, linear, run_tiny, says
from torch import nn
from typer.testing import CliRunner

from fedmed_flower import InputError, MedicalClient, SiteData, federate, run_local
from fedmed_flower.cli.main import app
from fedmed_flower.data.site import simulation
from fedmed_flower.prediction import Predictor
from fedmed_flower.strategies import FedAvg


def run_with(folder, client, make, **config):
    """Run a client whose model is what `make` makes of it."""
    server = ServerApp()

    @server.main()
    def main(grid, context):
        federate(FedAvg(), grid, context, make(client(context)))

    settings = CONFIG | {"num-server-rounds": 1, "run-dir": str(folder)} | config
    run_local(server, client.client_app(), 2, run_config=settings)
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    with simulation():
        run_tables(folder, num_sites=2)
    return folder


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictured") / "run"
    with simulation():
        run_with(folder, TinyClient, lambda client: client.build_model)
    return folder


def parts_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_parts(path, parts):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def changed_about(parts, change):
    about = json.loads(parts["predictor.json"])
    change(about)
    return parts | {"predictor.json": json.dumps(about)}


def test_it_holds_the_weights_of_the_run_and_nothing_of_a_row(finished):
    parts = parts_of(finished / "predictor.zip")
    assert set(parts) == {"predictor.json", "model.safetensors"}
    predictor = Predictor.load(finished)
    whole = load_file(finished / "model.safetensors")
    assert all(torch.equal(predictor.state[name], whole[name]) for name in whole)
    text = parts["predictor.json"].decode()
    assert "hospital" not in text
    assert not any(f"-{split}" in text for split in ("train", "val", "test"))


def test_the_file_alone_is_enough(finished, tmp_path):
    alone = tmp_path / "elsewhere.zip"
    alone.write_bytes((finished / "predictor.zip").read_bytes())
    predictor = Predictor.load(alone)
    client = predictor.client()
    rows = [{k: v for k, v in row.items() if k != "ill"} for row in patients(4, 3)]
    outputs = client.predict(predictor.network(client), client.prepare(rows, train=False))
    assert outputs.shape == (4, 1)


def test_writing_it_leaves_weights_and_generators_alone(tmp_path):
    """Of runs in which it is written and in which it cannot be."""

    class Refusing(TinyClient):
        # Read when a predictor is written, and at no other time.
        @property
        def ct_window(self):
            raise RuntimeError("no")

    Refusing.__name__ = Refusing.__qualname__ = "TinyClient"
    states = []
    for name, client in (("with", TinyClient), ("without", Refusing)):
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        random.seed(5)
        summary = run_with(tmp_path / name, client, lambda made: made.build_model)
        assert bool(summary["predictor"]) == (name == "without")
        drawn = (torch.rand(3).tolist(), np.random.rand(), random.random())  # noqa: NPY002
        states.append((drawn, (tmp_path / name / "model.safetensors").read_bytes()))
    assert states[0] == states[1]
    assert (tmp_path / "with" / "predictor.zip").exists()
    assert not (tmp_path / "without" / "predictor.zip").exists()


class Other(MedicalClient):
    """A client of rows of its own."""

    def load_data(self, site):
        return SiteData([{"patient": n, "x": float(n)} for n in range(4)] if site else [])

    def build_model(self):
        return nn.Linear(1, 1)

    def prepare(self, rows, train):
        return torch.tensor([[row["x"]] for row in rows])

    def fit(self, model, prepared, seed):
        return {"loss": 0.0}

    def measure(self, model, prepared):
        return {"num-examples": len(prepared), "loss": 0.0}


def test_a_model_of_which_nobody_knows_the_preparation_has_none(tmp_path):
    run_tiny(tmp_path / "function", model=linear)
    assert (
        "INFO no predictor.zip: federate was given a function"
        in (tmp_path / "function" / "log.txt").read_text()
    )
    with pytest.raises(InputError, match=r"has no predictor.zip: federate was given a function"):
        Predictor.load(tmp_path / "function")
    client = fixed(SiteData([{"patient": n, "x": float(n)} for n in range(4)]), Other)
    rows = [{"patient": n, "x": float(n)} for n in range(4)]
    client = fixed(SiteData(rows[:2], rows[2:3], rows[3:]), Other)
    summary = run_with(tmp_path / "other", client, lambda made: made)
    assert summary["predictor"] == (
        "Fixed is none of BagClient, ClassificationClient, FindingsClient, GradingClient, "
        "MeasurementClient, SegmentationClient, SurvivalClient, TabularClient, so its rows are the "
        "app's own: load model.safetensors into its build_model"
    )
    declared = TinyTable.schema.categories | {"ward": ("a", "b", "c")}
    own = type("Own", (TinyTable,), {"schema": TinyTable.schema.__class__(
        **{**vars(TinyTable.schema), "categories": declared})})  # fmt: skip
    _, summary = run_tables(tmp_path / "site", own, 2, preparation="site")
    assert 'with preparation="site" each hospital prepares its rows' in summary["predictor"]


def test_a_network_that_cannot_be_saved_does_not_end_the_run(tmp_path):
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear()

        def forward(self, images):
            # A path that depends on values.
            return self.layer(images) if images.sum() > 0 else self.layer(-images)

    client = type("Asking", (TinyClient,), {"build_model": lambda self: Asking()})
    summary = run_with(tmp_path / "run", client, lambda made: made)
    assert summary["status"] == "finished"
    assert (
        "so a prediction needs the app (--app): torch cannot trace it"
        in (tmp_path / "run" / "log.txt").read_text()
    )
    predictor = Predictor.load(tmp_path / "run")
    with pytest.raises(InputError, match=r"could not be saved without it .*, --app FOLDER$"):
        predictor.network(predictor.client())
    # With the app's class it is there.
    own = predictor.client(app=client)
    assert isinstance(predictor.network(own, app=True), Asking)


def test_a_hook_that_decides_about_a_prediction_is_named(tmp_path):
    class Inverted(TinyClient):
        def intensity(self):
            return []

    summary = run_with(tmp_path / "run", Inverted, lambda made: made.build_model)
    assert summary["predictor"] == ""
    predictor = Predictor.load(tmp_path / "run")
    with pytest.raises(InputError, match=says(
        "Inverted defines intensity itself, which decides about a prediction: give the folder of "
        "the app, --app FOLDER"
    )):  # fmt: skip
        predictor.client()
    assert type(predictor.client(app=Inverted)) is Inverted
    with pytest.raises(InputError, match="the client of the app is TinyClient, and that of the"):
        predictor.client(app=TinyClient)
    changed = type("Inverted", (Inverted,), {"modality": "ct"})
    with pytest.raises(InputError, match="modality of Inverted is 'ct' and was '' in the run"):
        predictor.client(app=changed)


def test_training_hooks_and_names_of_the_app_do_not_matter(tmp_path):
    class Training(TinyClient):
        def augment(self, images):
            return images

        def own_helper(self):
            return 1

    run_with(tmp_path / "run", Training, lambda made: made)
    assert Predictor.load(tmp_path / "run").description.overridden == ()


def test_a_method_of_a_mixin_behind_the_base_counts(tmp_path):
    from fedmed_flower import ClassificationClient
    from fedmed_flower.clients.imaging import ImagingClient

    class Mixin(ImagingClient):
        def to_size(self, train):
            return []

    class Mixed(ClassificationClient, Mixin):
        num_classes = 2
        load_data = TinyClient.load_data
        build_model = TinyClient.build_model

    run_with(tmp_path / "run", Mixed, lambda made: made)
    assert Predictor.load(tmp_path / "run").description.overridden == ("to_size",)


def test_a_resumed_run_has_no_predictor_of_an_earlier_end(tmp_path):
    folder = tmp_path / "run"
    run_tables(folder, num_sites=2)

    class Failing(TinyTable):
        def fit(self, model, prepared, seed):
            raise RuntimeError("broken")

    Failing.__name__ = Failing.__qualname__ = "TinyTable"
    with pytest.raises(Exception, match="all 2 sites failed alike"):
        run_tables(folder, Failing, 2, **{"num-server-rounds": 3, "resume": True})
    with pytest.raises(InputError, match="as its run is failed: go on with --resume"):
        Predictor.load(folder)


def test_a_run_that_trains_a_part_has_the_whole_model(tmp_path):
    from tiny import halves

    client = type("Half", (TinyClient,), {"build_model": lambda self: halves()})
    run_with(tmp_path / "run", client, lambda made: made, trainable="head.*")
    whole = load_file(tmp_path / "run" / "model.safetensors")
    state = Predictor.load(tmp_path / "run").state
    assert {*state} == {*halves().state_dict()} == {*whole}
    assert all(torch.equal(state[name], whole[name]) for name in whole)


def test_a_hospitals_own_model_is_used_by_its_file(tmp_path):
    folder = tmp_path / "run"
    settings = {"personal-epochs": 10, "num-server-rounds": 1}
    run_tables(folder, num_sites=2, **settings)
    own = folder / "personal" / "hospital-1.safetensors"
    rows = [{k: v for k, v in row.items() if k != "ill"} for row in patients(4, 3)]
    predictor = Predictor.load(folder)
    client = predictor.client()
    prepared = client.prepare(rows, train=False)
    mine = client.predict(predictor.with_weights(own).network(client), prepared)
    state = load_file(own)
    features = prepared.inputs["features"]
    wanted = nn.functional.linear(features, state["weight"], state["bias"]).numpy()
    assert np.array_equal(mine, wanted)
    assert not np.array_equal(mine, client.predict(predictor.network(client), prepared))
    (tmp_path / "wrong.safetensors").write_bytes(save({"weight": torch.zeros(1, 2)}))
    for path, text in (
        (
            tmp_path / "wrong.safetensors",
            r"does not fit the model of .*: bias is missing and must be float32 \(1,\)",
        ),
        (folder / "config.toml", "is no file of weights"),
        (tmp_path / "absent", "cannot be read: No such file or directory"),
    ):
        with pytest.raises(InputError, match=text):
            predictor.with_weights(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda about: about.update(format=2), "has the format '2' and this version reads 1"),
        (lambda about: about["description"].update(base="Path"), "base must be one of"),
        (lambda about: about["description"]["declared"].pop("schema"), "declared must hold"),
        (lambda about: about["description"]["declared"].update(zeros="x"), "zeros must not be"),
        (
            lambda about: about["description"]["declared"]["schema"].update(task="x"),
            "task must be one of",
        ),
        (
            lambda about: about["description"]["declared"]["schema"].update(more=1),
            "a schema has no more",
        ),
        (lambda about: about["description"].pop("agreed"), "cannot be read .KeyError"),
        (lambda about: about["description"]["settings"].update(x=[]), "settings must be numbers"),
    ],
)
def test_a_file_that_was_changed_is_refused(change, text, finished, tmp_path):
    parts = changed_about(parts_of(finished / "predictor.zip"), change)
    path = write_parts(tmp_path / "predictor.zip", parts)
    with pytest.raises(InputError, match=text):
        Predictor.load(path).client()


def test_a_file_of_other_members_or_no_archive_is_refused(finished, tmp_path):
    parts = parts_of(finished / "predictor.zip")
    path = write_parts(tmp_path / "a.zip", parts | {"code.py": "print()"})
    with pytest.raises(InputError, match=r"it has a member code.py, which no predictor has"):
        Predictor.load(path)
    (tmp_path / "b.zip").write_bytes((finished / "predictor.zip").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cannot be read \(BadZipFile"):
        Predictor.load(tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("predictor.json", " " * 10**6)
    with pytest.raises(InputError, match="compressed, encrypted or damaged"):
        Predictor.load(tmp_path / "c.zip")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "predictor.zip").symlink_to(finished / "predictor.zip")
    with pytest.raises(InputError, match="a link leads out of the folder"):
        Predictor.load(tmp_path / "folder")
    result = CliRunner().invoke(app, ["predict", str(tmp_path / "no"), "x", "--out", "y"])
    assert result.exit_code == 2
    assert f"{tmp_path / 'no'} is not there: give a run folder" in result.stdout


def test_settings_of_a_stranger_name_no_file(finished, tmp_path):
    """Of a file's settings only those count by which rows are prepared and networks built."""

    def change(about):
        about["description"]["settings"] |= {"bundle": "/etc", "run-dir": "/tmp/x", "device": "x"}

    parts = changed_about(parts_of(finished / "predictor.zip"), change)
    client = Predictor.load(write_parts(tmp_path / "predictor.zip", parts)).client()
    assert client.settings.device == "cpu"
    assert client.models.bundle == ""


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (["n", "aten.from_file.default", ["/etc/passwd"], {}], "is no operation of a network"),
        (["n", "os.system", ["id"], {}], "is no operation of a network"),
        (["n", "aten.relu.default", [{"of": "later"}], {}], "'later' is no earlier result"),
        (["n", "aten.relu.nothing", [{"of": "images"}], {}], "has no overload"),
        (["n", "size.getattr", [{"of": "images"}, "x"], {}], "KeyError: 'getattr'"),
        (["n", "aten.relu_.default", [{"of": "p_1_weight"}], {}], "would change a weight"),
        (["n", "aten.relu.default", [{"code": "x"}], {}], "KeyError: 'code'"),
    ],
)
def test_a_graph_of_a_stranger_computes_and_does_nothing_else(step, text, pictured, tmp_path):
    parts = parts_of(pictured / "predictor.zip")
    graph = json.loads(parts["graph.json"])
    step = json.loads(json.dumps(step).replace("images", graph["input"]))
    graph["steps"].append(step)
    path = write_parts(tmp_path / "p.zip", parts | {"graph.json": json.dumps(graph)})
    predictor = Predictor.load(path)
    with pytest.raises(InputError, match=text):
        predictor.network(predictor.client())


CLIENT = """
import numpy as np
from torch import nn
from fedmed_flower import ClassificationClient, SiteData


class Hospital(ClassificationClient):
    num_classes = 2
    image_shape = (1, 8, 8)

    def build_model(self):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    {more}
    def load_data(self, site):
        rng = np.random.default_rng(site.index)
        rows = [
            {{"image": rng.integers(0, 99, (8, 8)) + 9 * (n % 2), "label": n % 2, "patient": n}}
            for n in range(24)
        ]
        return SiteData(rows[:12], rows[12:16], rows[16:], source="made up")


app = Hospital.client_app()
"""


@pytest.mark.slow
def test_a_fresh_process_needs_no_app_unless_a_hook_is_its_own(tmp_path):
    from PIL import Image

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pixels = np.random.default_rng(4).integers(0, 99, (8, 8)).astype(np.uint8)
    Image.fromarray(pixels).save(elsewhere / "new.png")
    plain = write_app(tmp_path / "apps" / "plain", CLIENT.format(more=""))
    run_and_forget(plain, tmp_path / "run")
    done = fedmed("predict", tmp_path / "run", "new.png", "--out", "out.csv", cwd=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = lines_of(elsewhere / "out.csv")
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    image = torch.from_numpy(pixels.astype(np.float32))
    image = (image - image.mean()) / image.std(unbiased=False)
    share = model(image[None, None]).double().softmax(dim=1)[0, 1].item()
    assert float(line["probability 1"]) == pytest.approx(share, rel=1e-6)

    more = "def intensity(self):\n        return []\n"
    own = write_app(tmp_path / "apps" / "own", CLIENT.format(more=more))
    kept = write_app(tmp_path / "kept" / "own", CLIENT.format(more=more))
    run_and_forget(own, tmp_path / "run-own")
    arguments = ("predict", tmp_path / "run-own", "new.png", "--out")
    done = fedmed(*arguments, "own.csv", cwd=elsewhere)
    assert done.returncode == 2
    assert "Hospital defines intensity itself" in done.stdout
    done = fedmed(*arguments, "own.csv", "--app", kept, cwd=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = lines_of(elsewhere / "own.csv")
    model.load_state_dict(load_file(tmp_path / "run-own" / "model.safetensors"))
    outputs = model(torch.from_numpy(pixels.astype(np.float32))[None, None])
    share = outputs.double().softmax(dim=1)[0, 1].item()
    assert float(line["probability 1"]) == pytest.approx(share, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("images", "images/0*.png"), ("masks", "images/0*.nii.gz"), ("table", "*.csv")],
)
def test_a_fresh_process_without_the_app_gives_the_same_files(kind, pattern, tmp_path):
    """What this process gives is compared with the model called by hand in `test_files`."""
    done = fedmed("new", tmp_path / "mine", "--for", kind, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run_and_forget(tmp_path / "mine", tmp_path / "run", "--rounds", "1")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = fedmed("data", "phantoms", elsewhere, "clinic", "--for", kind, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (elsewhere / "predictor.zip").write_bytes((tmp_path / "run" / "predictor.zip").read_bytes())
    files = sorted((elsewhere / "clinic").glob(pattern))
    names = [file.relative_to(elsewhere) for file in files]
    done = fedmed("predict", "predictor.zip", *names, "--out", "fresh", cwd=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    predict(elsewhere / "predictor.zip", *files, "--out", elsewhere / "here")

    fresh = lines_of(elsewhere / "fresh" / "predictions.csv")
    here = lines_of(elsewhere / "here" / "predictions.csv")
    assert len(fresh) >= len(files)
    paths = ("file", "mask")
    for one, other in zip(fresh, here, strict=True):
        assert {k: v for k, v in one.items() if k not in paths} == {
            k: v for k, v in other.items() if k not in paths
        }
    masks = sorted((elsewhere / "fresh").glob("*.nii.gz"))
    assert len(masks) == (len(files) if kind == "masks" else 0)
    for mask in masks:
        assert mask.read_bytes() == (elsewhere / "here" / mask.name).read_bytes()
