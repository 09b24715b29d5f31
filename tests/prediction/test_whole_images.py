"""Predictions of files by clients that say something of a whole image."""

import json

import numpy as np
import pytest
import torch
from eyes import FINDINGS, GRADES, Cups, Findings, Grades, network
from PIL import Image
from predicting import lines_of, predict, run_of
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedmed_flower.cli.main import app
from fedmed_flower.data.phantoms import eyes
from fedmed_flower.metrics.grades import grade_shares


def predicted(tmp_path, client, outputs):
    """Return the lines for three pictures, the model's own outputs for them, and the run."""
    small = type(client.__name__, (client,), {"train": 16, "test": 12})
    run = run_of(tmp_path / "run", small)
    files = []
    batch = []
    for number, eye in enumerate(eyes(3, seed=9)):
        pixels = (200 * eye["image"]).clip(0, 255).astype(np.uint8)
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
        values = torch.from_numpy(pixels.astype(np.float32))
        batch.append(((values - values.mean()) / values.std(correction=0))[None])
    predict(run, *files, "--out", tmp_path / "out.csv")
    model = network(outputs)
    model.load_state_dict(load_file(run / "model.safetensors"))
    with torch.no_grad():
        return lines_of(tmp_path / "out.csv"), model(torch.stack(batch)), run


def test_findings_have_a_column_each(tmp_path):
    lines, outputs, run = predicted(tmp_path, Findings, 3)
    assert [*lines[0]] == ["file", *(f"probability {name}" for name in FINDINGS), "problem"]
    for line, shares in zip(lines, outputs.sigmoid().tolist(), strict=True):
        given = [float(line[f"probability {name}"]) for name in FINDINGS]
        assert given == pytest.approx(shares, rel=1e-4)
    done = CliRunner().invoke(
        app, ["export", str(run), "--to", "bundle", "--out", str(tmp_path / "bundle")]
    )
    assert done.exit_code == 2
    assert "a MONAI bundle holds classes or masks" in " ".join(done.stdout.split())


def test_a_number_stands_in_its_unit(tmp_path):
    lines, outputs, run = predicted(tmp_path, Cups, 1)
    assert [*lines[0]] == ["file", "predicted (of the disc)", "problem"]
    given = [float(line["predicted (of the disc)"]) for line in lines]
    # From 0 to 1: the middle, and a quarter of the range.
    assert given == pytest.approx((0.5 + 0.25 * outputs[:, 0]).tolist(), rel=1e-4)
    done = CliRunner().invoke(
        app, ["export", str(run), "--to", "torchscript", "--out", str(tmp_path / "model.ts")]
    )
    assert done.exit_code == 0, done.stdout
    extra = {"metadata.json": ""}
    torch.jit.load(tmp_path / "model.ts", _extra_files=extra)
    text = "float32 (batch, 1): number = 0.25 * output + 0.5"
    assert json.loads(extra["metadata.json"])["outputs"] == text


def test_grades_have_a_probability_each_and_the_median(tmp_path):
    lines, outputs, _ = predicted(tmp_path, Grades, 4)
    names = [f"probability {name}" for name in GRADES]
    assert [*lines[0]] == ["file", *names, "predicted", "problem"]
    falls = torch.nn.functional.softplus(outputs[:, 1:]).cumsum(dim=1)
    above = torch.cat([outputs[:, :1], outputs[:, :1] - falls], dim=1)
    expected = grade_shares(above.double().numpy())
    for line, shares, passed in zip(lines, expected, above > 0, strict=True):
        assert [float(line[name]) for name in names] == pytest.approx(shares.tolist(), rel=1e-4)
        assert line["predicted"] == GRADES[int(passed.sum())]
