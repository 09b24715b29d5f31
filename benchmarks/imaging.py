"""Time and memory of an epoch here against a plain MONAI training loop on the same volumes.

Both read the same NIfTI files, bring them to RAS, normalise, cut one patch a volume and train the
same UNet with DiceCE; both keep what never changes in memory (MONAI's CacheDataset). Epochs of the
two take turns in one process. With ``--device cuda`` also: several sites on one card.

With ``--messages``: what a real hospital, where each message is a process of its own, takes until
training can begin, with and without `image-cache`, against MONAI's CacheDataset on the same files.
Volumes are generated, with noise, so that they pack as badly as real ones.

    OMP_NUM_THREADS=1 python benchmarks/imaging.py
    python benchmarks/imaging.py --device cuda --sites 1 2 4 8
    OMP_NUM_THREADS=1 python benchmarks/imaging.py --messages
    OMP_NUM_THREADS=1 python benchmarks/imaging.py --messages --size 512 --volumes 8
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import documented
import nibabel
import numpy as np
import torch
from flwr.app import Context, RecordDict
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandCropByPosNegLabeld,
    SpatialPadd,
)

from fedmed_flower import SegmentationClient, SiteData
from fedmed_flower.data.decathlon import load_hippocampus
from fedmed_flower.data.download import SourceUnavailable
from fedmed_flower.data.phantoms import hippocampi
from fedmed_flower.models.device import half_precision, make_optimizer, torch_environment

PATCH, BATCH = (40, 56, 40), 4
KEYS = ["image", "label"]
# Rows and columns, and slices, of a generated scan.
_SMALL, _SLICES = 128, 64


def network():
    return UNet(3, 1, 3, (16, 32, 64, 128), (2, 2, 2), num_res_units=2, norm="instance")


def volumes(folder, count):
    """Return rows with paths: real volumes where they can be had, else generated ones."""
    try:
        return list(load_hippocampus(timeout=10).rows[:count]), "hippocampus, MSD Task04"
    except SourceUnavailable:
        rows = []
        for row in hippocampi(count, size=40).rows:
            paths = {key: str(Path(folder) / f"{row['patient']}-{key}.nii.gz") for key in KEYS}
            for key in KEYS:
                nibabel.save(nibabel.Nifti1Image(row[key], np.eye(4)), paths[key])
            rows.append(paths | {"patient": row["patient"]})
        return rows, "generated data, not patients"


class Hospital(SegmentationClient):
    """A hospital that holds some volumes."""

    classes, spatial_dims = ("anterior", "posterior"), 3
    rows: tuple = ()

    def build_model(self):
        """Return the network that both loops train."""
        return network()

    def load_data(self, site):
        """Return the volumes."""
        return SiteData(self.rows)


def client(rows, device, **config):
    settings = {"batch-size": BATCH, "device": device, "patch-size": ",".join(map(str, PATCH))}
    settings |= {key.replace("_", "-"): value for key, value in config.items()}
    node = {"site-name": "here"}
    made = Hospital(Context(1, 1, node, RecordDict(), settings))
    made.rows = tuple(rows)
    return made


class Ours:
    """The client's own loop."""

    name = "fedmed_flower"

    def __init__(self, rows, device):
        self.client = client(rows, device)
        self.prepared = self.client.prepare(rows, train=True)
        self.model, _ = self.client.fresh_model()

    def epoch(self, seed):
        """Train once on each volume."""
        self.client.fit(self.model, self.prepared, seed)


def cached_by_monai(rows):
    """Return rows as MONAI's tutorials prepare them."""
    chain = [
        LoadImaged(KEYS),
        EnsureChannelFirstd(KEYS),
        Orientationd(KEYS, axcodes="RAS", labels=None),
        NormalizeIntensityd("image", channel_wise=True),
        SpatialPadd(KEYS, PATCH),
        RandCropByPosNegLabeld(KEYS, "label", PATCH, num_samples=1),
    ]
    return CacheDataset(rows, Compose(chain), progress=False, num_workers=0)


class Plain:
    """A training loop as MONAI's tutorials write it."""

    name = "plain MONAI loop"

    def __init__(self, rows, device):
        data = cached_by_monai(rows)
        self.batches = DataLoader(data, num_workers=0, batch_size=BATCH, shuffle=True)
        self.device = torch.device(device)
        self.model, self.loss = (
            network().to(self.device),
            DiceCELoss(to_onehot_y=True, softmax=True),
        )

    def epoch(self, seed):
        """Train once on each volume."""
        torch.manual_seed(seed)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        half = self.device.type == "cuda"
        self.model.train()
        for batch in self.batches:
            images, labels = (batch[key].to(self.device) for key in KEYS)
            optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                value = self.loss(self.model(images), labels)
            value.backward()
            optimizer.step()
            value.item()


def seconds(work, device):
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(rows, device, epochs):
    """Yield rows: what each takes to begin and for an epoch, epochs taking turns."""
    made, start = {}, {}
    for kind in (Ours, Plain):
        start[kind.name] = seconds(
            lambda kind=kind: made.update({kind: kind(rows, device)}), device
        )
    times = {kind: [] for kind in made}
    for number in range(epochs + 1):
        for kind in (Ours, Plain) if number % 2 else (Plain, Ours):
            times[kind].append(seconds(partial(made[kind].epoch, number), device))
    times = {kind: found[1:] for kind, found in times.items()}
    ratios = [a / b for a, b in zip(times[Ours], times[Plain], strict=True)]
    seconds_each = [f"{start[kind.name]:.2f}" for kind in (Ours, Plain)]
    yield ["reading and preparing, s", *seconds_each, ""]
    medians = [f"{statistics.median(times[kind]):.2f}" for kind in (Ours, Plain)]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    yield [f"an epoch, s, median of {epochs}", *medians, ratio]


def measured(rows, device, epochs):
    """Yield all rows of the table."""
    yield from compare(rows, device, epochs)
    ours = Ours(rows, device)
    ours.epoch(0)
    plain = min(seconds(lambda: ours.epoch(1), device) for _ in range(2))
    private = private_epoch(rows, device)
    yield ["a private epoch beside a plain one, s", f"{private:.2f}", "", f"{private / plain:.2f}"]
    peaks = {kind: memory(kind, rows, device) for kind in ("Ours", "Plain", "private")}
    yield ["peak memory", peaks["Ours"], peaks["Plain"], ""]
    yield ["peak memory of a private epoch", peaks["private"], "", ""]


def memory(kind, rows, device):
    """Return the most memory of a process that reads, prepares and trains an epoch."""
    task = json.dumps({"kind": kind, "rows": rows, "device": device})
    command = [sys.executable, __file__, "--task", task]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def work(task):
    """Do one task in a process of its own and print its peak memory."""
    rows, device = task["rows"], task["device"]
    with torch_environment(0, 1, torch.device(device)):
        if task["kind"] == "private":
            private_epoch(rows, device)
        else:
            run = {"Ours": Ours, "Plain": Plain}[task["kind"]](rows, device)
            for number in range(task.get("epochs", 1)):
                run.epoch(number)
    # Of this process alone: what getrusage tells begins with the parent's.
    status = Path("/proc/self/status").read_text()
    peak, unit = int(status.partition("VmHWM:")[2].split()[0]) * 1024, "process"
    if device == "cuda":
        peak, unit = torch.cuda.max_memory_reserved(), "GPU"
    print(f"{peak / 2**30:.2f} GiB ({unit})")


def private_epoch(rows, device):
    """Train as many private steps as an epoch has; return what they took."""
    from fedmed_flower.clients.training import train_privately
    from fedmed_flower.privacy.accounting import Release
    from fedmed_flower.privacy.gradients import PROBE
    from fedmed_flower.privacy.patient import Mechanism
    from fedmed_flower.settings.privacy import PrivacySettings

    made = client(rows, device, privacy="patient")
    prepared, (model, _) = made.prepare(rows, train=True), made.fresh_model()
    steps, rate = -(-len(rows) // BATCH), BATCH / len(rows)
    settings = PrivacySettings(privacy="patient")
    mechanism = Mechanism(Release(rate, 1.0), steps, len(rows), settings)
    optimizer = make_optimizer(made.settings, model)

    def train():
        train_privately(
            model,
            lambda places: made.batch_of(prepared, places),
            [row["patient"] for row in rows],
            made.loss_of,
            optimizer,
            mechanism,
            made.batch_of(prepared, range(PROBE)),
            half_precision(made.settings),
        )

    train()
    return seconds(train, device)


def share(rows, device, counts):
    """Print what an epoch of each of several sites takes that train side by side."""
    for count in counts:
        task = json.dumps({"kind": "Ours", "rows": rows, "device": device, "epochs": 20})
        command = [sys.executable, __file__, "--task", task]
        began = time.perf_counter()
        running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
        peaks = [process.communicate()[0].decode().strip() for process in running]
        took = (time.perf_counter() - began) / count
        print(f"{count} sites side by side: {took:.1f} s a site for 20 epochs; each {peaks[0]}")


def scans(folder, count, size):
    """Write volumes with noise, and masks of two structures, and return their rows."""
    rng = np.random.default_rng(0)
    shape = (size, size, _SLICES)
    rows = []
    for number in range(count):
        coarse = torch.from_numpy(rng.normal(size=[side // 8 for side in shape]))
        smooth = torch.nn.functional.interpolate(coarse[None, None], shape, mode="trilinear")
        body = smooth[0, 0].numpy()
        image = (300 * body + rng.normal(0, 15, shape)).astype(np.int16)
        mask = (body > 0.8).astype(np.uint8) + (body > 1.5)
        row = {"patient": f"made up {number}"}
        for key, array in (("image", image), ("label", mask)):
            row[key] = str(Path(folder) / f"{number}-{key}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 2.0, 1.0])), row[key])
        rows.append(row)
    # A file that has changed in this moment is not kept.
    time.sleep(2.5)
    return rows


def message(task):
    """Do in this process what a message does until training can begin; print CPU seconds."""
    rows = task["rows"]
    if task["message"] == "monai":
        began = time.process_time()
        cached_by_monai(rows)
    else:
        node = {"site-name": "north", "data-dir": task["folder"], "image-cache": task["cache"]}
        settings = {"device": "cpu", "patch-size": ",".join(map(str, PATCH))}
        made = Hospital(Context(1, 1, node, RecordDict(), settings))
        made.rows = tuple(rows)
        began = time.process_time()
        made.prepared("train", pooled=False)
    took = time.process_time() - began
    print(json.dumps([took, began]))


def messages(count, size, repeats):
    """Yield a row for each kind of message: CPU seconds, and their ratio to MONAI's."""
    kinds = {
        "MONAI's CacheDataset": ("monai", False),
        "image-cache=off: each message": ("off", False),
        "first message": ("cache", False),
        "second message": ("cache", True),
    }
    took = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in ("files", "data", "cache")}
        places["files"].mkdir()
        places["data"].mkdir()
        rows = scans(places["files"], count, size)
        for _ in range(repeats):
            for name, (kind, warm) in kinds.items():
                if not warm:
                    shutil.rmtree(places["cache"], ignore_errors=True)
                cache = "off" if kind == "off" else str(places["cache"])
                task = {"message": kind, "rows": rows, "folder": str(places["data"])}
                text = json.dumps(task | {"cache": cache})
                command = [sys.executable, "-W", "ignore", __file__, "--task", text]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                took[name].append(json.loads(done.stdout.splitlines()[-1]))
        kept = sum(path.stat().st_size for path in places["cache"].iterdir())
    plain = [own for own, _ in took["MONAI's CacheDataset"]]
    first = [own for own, _ in took["first message"]]
    for name, found in took.items():
        own, imports = (statistics.median(column) for column in zip(*found, strict=True))
        ratios = [
            statistics.median(a / b for (a, _), b in zip(found, others, strict=True))
            for others in (plain, first)
        ]
        yield [name, f"{own:.2f}", *(f"{ratio:.3f}" for ratio in ratios), f"{imports:.1f}"]
    yield ["kept on the disk", f"{kept / 2**30:.2f} GiB", "", "", ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--volumes", type=int, help="48, or 100 with --messages")
    parser.add_argument("--messages", action="store_true")
    parser.add_argument("--size", type=int, default=_SMALL, help="rows and columns of --messages")
    parser.add_argument("--repeats", type=int, default=3, help="of --messages")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--sites", type=int, nargs="+", default=[])
    parser.add_argument("--task", help=argparse.SUPPRESS)
    documented.add_options(parser)
    options = parser.parse_args()
    if options.task:
        task = json.loads(options.task)
        if "message" in task:
            message(task)
        else:
            work(task)
        return
    if options.messages:
        count = options.volumes or 100
        what = f"CPU s of a message, {count} volumes of {options.size}x{options.size}x{_SLICES}"
        head = (what, "seconds", "to MONAI's", "to the first", "imports")
        table = messages(count, options.size, options.repeats)
        versions = ("torch", "monai")
        if options.size == _SMALL:
            documented.show("messages", head, table, options, versions=versions)
        else:
            documented.show("clinical messages", head, table, options, versions=versions)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows, source = volumes(folder, options.volumes or 48)
        device = options.device
        print(f"{len(rows)} volumes ({source}), patches of {PATCH}, batch {BATCH}, {device}\n")
        head = (f"{len(rows)} volumes ({source})", Ours.name, Plain.name, "ratio")
        with torch_environment(0, 1, torch.device(device)):
            table = measured(rows, device, options.epochs)
            documented.show("imaging", head, table, options, versions=("torch", "monai"))
        share(rows, device, options.sites)


if __name__ == "__main__":
    main()
