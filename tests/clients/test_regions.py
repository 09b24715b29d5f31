"""Regions that overlap: whole tumour, tumour core and enhancing tumour, a channel each."""

import json

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.transforms import AsDiscrete
from safetensors.torch import load_file
from tiny import context_of, run_tiny

from fedmed_flower import SegmentationClient, SiteData
from fedmed_flower.data.phantoms import brain_tumours

BRATS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}


class Tumours(SegmentationClient):
    """Three hospitals with generated heads."""

    regions = BRATS
    spatial_dims = 3
    image_shape = (4, 16, 16, 16)
    modality = "mr"

    def build_model(self):
        return UNet(3, 4, 3, (8, 16), (2,), num_res_units=1, norm="instance")

    def load_data(self, site):
        rows = brain_tumours(10, site.index, size=16).rows
        return SiteData(rows[:6], rows[6:7], rows[7:])


def test_a_federated_run_learns_all_three_regions(tmp_path):
    run = tmp_path / "run"
    config = {"num_server_rounds": 3, "local_epochs": 6, "batch_size": 2, "pictures": 1}
    config |= {"optimizer": "adam", "learning_rate": 0.02}
    model = Tumours(context_of()).build_model
    run_tiny(run, Tumours, num_sites=3, model=model, **config)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["failures"] == []
    found = summary["test"]["federated"]
    kinds = ("dice", "hd95", "surface-dice")
    assert set(found) == {
        *(f"{kind}-{name}" for kind in kinds for name in BRATS),
        *("dice", "hd95", "surface-dice", "dice-worst"),
    }
    for name in BRATS:
        assert found[f"dice-{name}"] > 0.6, name
    assert len(summary["pictures"]) >= 3
    # MONAI's own metric on outputs that are thresholded by MONAI.
    network = model()
    network.load_state_dict(load_file(run / "model.safetensors"))
    network.eval()
    client = Tumours(context_of())
    metric = DiceMetric(reduction="mean_batch", ignore_empty=False)
    discrete = AsDiscrete(threshold=0.5)
    for index in range(3):
        rows = Tumours(context_of(index, 3)).load_data(type("Site", (), {"index": index})()).test
        prepared = client.prepare(rows, train=False)
        for row, number in zip(rows, range(len(rows)), strict=True):
            image = torch.as_tensor(np.asarray(prepared[number]["image"]))
            with torch.no_grad():
                guess = discrete(network(image[None])[0].sigmoid())
            truth = np.stack([np.isin(row["label"], values) for values in BRATS.values()])
            metric(guess[None], torch.from_numpy(truth)[None].float())
    wanted = metric.aggregate().tolist()
    assert [found[f"dice-{name}"] for name in BRATS] == pytest.approx(wanted, abs=1e-6)
