"""Each network trains through a whole federated run, plain and private, in 2D and 3D."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from networks import NETWORKS, build, input_of
from safetensors.torch import load_file
from tiny import run_tiny

from fedmed_flower import ClassificationClient, SegmentationClient, SiteData


def rows_of(site, shape, masks):
    rows = []
    for number in range(2):
        rng = np.random.default_rng([site.index, number])
        image = rng.normal(size=shape).astype(np.float32)
        label = (image > 0.5).astype(np.uint8) if masks else number
        rows.append({"image": image, "label": label, "patient": f"{site.name}-{number}"})
    return rows


def client_of(name, dims, network):
    masks, shape = NETWORKS[name][1], input_of(name, dims)
    members = {
        "spatial_dims": dims,
        "build_model": lambda self: deepcopy(network),
        "load_data": lambda self, site: SiteData(rows_of(site, shape, masks)),
    }
    members |= {"classes": ("it",)} if masks else {"num_classes": 2}
    return type("Client", (SegmentationClient if masks else ClassificationClient,), members)


# In 3D these take ten seconds each.
HEAVY = ("EfficientNet-B0", "SwinUNETR", "VNet")
CASES = [
    pytest.param(name, dims, marks=[pytest.mark.slow] if dims == 3 and name in HEAVY else [])
    for name in NETWORKS
    for dims in (2, 3)
]


@pytest.mark.parametrize("privacy", ["none", "patient"])
@pytest.mark.parametrize(("name", "dims"), CASES)
def test_a_network_trains_at_two_hospitals(tmp_path, monkeypatch, name, dims, privacy):
    # Which method is faster is measured once: here it saves no time to measure well.
    monkeypatch.setattr("fedmed_flower.privacy.gradients._REPEATS", 1)
    config = {"privacy": privacy, "sampling_rate": 1.0, "num_server_rounds": 1, "batch_size": 2}
    config["fewest_steps"] = 0
    config["patch_size"] = ",".join(map(str, input_of(name, dims)))
    network, run = build(name, dims), tmp_path / "run"
    run_tiny(run, client_of(name, dims, network), model=lambda: network, **config)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["failures"]) == ("finished", [])
    assert set(summary["privacy"].get("patient", {}).get("sites", {})) == (
        {"hospital-1", "hospital-2"} if privacy == "patient" else set()
    )
    before, after = dict(network.named_parameters()), load_file(run / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in after.values())
    moved = [key for key, p in before.items() if not torch.equal(p, after[key])]
    assert len(moved) > 0.9 * sum(p.requires_grad for p in before.values())
