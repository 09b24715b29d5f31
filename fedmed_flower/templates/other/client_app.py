"""A hospital that learns from heart beats who is sick: rows of a form of your own."""

import numpy as np
import torch
from torch.nn import Linear
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from fedmed_flower import MedicalClient, Site, SiteData
from fedmed_flower.data import phantom_folder, split_patients
from fedmed_flower.metrics import classification_metrics
from fedmed_flower.models.device import torch_device


class Hospital(MedicalClient):
    """A hospital with data of another kind."""

    def load_data(self, site: Site) -> SiteData:
        folder = site.data_dir or phantom_folder(site, "other")
        with np.load(folder / "beats.npz") as file:
            columns = zip(file["beat"], file["sick"], file["patient"], strict=True)
            rows = [{"beat": beat, "sick": sick, "patient": who} for beat, sick, who in columns]
        return SiteData(
            **split_patients(rows, self.settings.seed),
            source="beats.npz",
            generated=(folder / "GENERATED").exists(),
        )

    def build_model(self):
        return Linear(100, 2)

    def prepare(self, rows, train):
        """Return as many items as rows, as the network takes them."""
        device = torch_device(self.settings)
        beats = torch.tensor(np.stack([row["beat"] for row in rows]), device=device)
        sick = torch.tensor([int(row["sick"]) for row in rows], device=device)
        return TensorDataset(beats, sick)

    def batch_of(self, prepared, indices):
        beats, sick = prepared[list(indices)]
        return {"beats": beats, "sick": sick}

    def loss_of(self, model, batch):
        return cross_entropy(model(batch["beats"]), batch["sick"])

    def measure(self, model, prepared):
        beats, sick = prepared[:]
        with torch.no_grad():
            outputs = model(beats)
        return classification_metrics(sick.cpu(), outputs.cpu())


app = Hospital.client_app()
