"""A real hospital with images in files, whose messages are asked one by one."""

import nibabel
import numpy as np
from PIL import Image
from tiny import ask, bits, context_of, linear, model_arrays, node_of
from torch import nn

from fedmed_flower import ClassificationClient, SegmentationClient, SiteData
from fedmed_flower.clients import kept_images
from fedmed_flower.images import reading

PATIENTS = 6


class Volumes(SegmentationClient):
    """Outlines two structures in NIfTI files."""

    classes, spatial_dims, image_shape = ("a", "b"), 3, (1, 8, 8, 8)

    def build_model(self):
        return nn.Conv3d(1, 3, 1)

    def load_data(self, site):
        return listed(site.data_dir)


class Pictures(ClassificationClient):
    """Classifies pictures."""

    num_classes, image_shape = 2, (1, 2, 2)

    def build_model(self):
        return linear(2)

    def load_data(self, site):
        return listed(site.data_dir)


def listed(folder):
    """Return the patients of a folder, the last two for test."""
    rows = []
    for path in sorted(folder.glob("image-*")):
        number = path.name.removeprefix("image-").partition(".")[0]
        mask = folder / f"mask-{number}.nii.gz"
        label = str(mask) if mask.exists() else int(number) % 2
        rows.append({"image": str(path), "label": label, "patient": f"p{number}"})
    return SiteData(train=rows[:-2], val=(), test=rows[-2:])


def write_volume(folder, number, seed=0):
    rng = np.random.default_rng((seed, number))
    affine = np.diag([-1.0, 2.0, 1.5, 1.0])
    affine[:3, 3] = 3
    image = rng.normal(size=(7, 6, 5)).astype(np.float32)
    mask = rng.integers(0, 3, image.shape).astype(np.uint8)
    for name, array in (("image", image), ("mask", mask)):
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / f"{name}-{number}.nii.gz")


def write_picture(folder, number, seed=0):
    rng = np.random.default_rng((seed, number))
    picture = rng.integers(0, 255, (2, 2)).astype(np.uint8)
    Image.fromarray(picture).save(folder / f"image-{number}.png")


class Hospital:
    """A hospital, each message to which is a process of its own as far as it keeps in memory.

    Attributes
    ----------
    data, cache : Path
        Its folders of images, and of those that are kept.
    read : list of str
        The files that the last message has read, in order.
    """

    def __init__(self, tmp_path, monkeypatch, client, write):
        # The files of a test have changed in this moment.
        monkeypatch.setattr(kept_images, "FRESH_NS", 0)
        self.data = tmp_path / "data"
        self.cache = tmp_path / "kept"
        self.data.mkdir()
        self.client = client
        self.read = []
        for number in range(PATIENTS):
            write(self.data, number)
        read = reading._read

        def noted(source, *args):
            if isinstance(source, str):  # Made-up images are arrays.
                self.read.append(source)
            return read(source, *args)

        monkeypatch.setattr(reading, "_read", noted)

    def context(self, cache=None, node=(), **config):
        cache = str(self.cache) if cache is None else cache
        own = {"min_train_patients": 1, "min_evaluated_patients": 1, "image_cache": cache}
        return context_of(node_config=node_of(self.data, **own | dict(node)), **config)

    def asked(self, kind="train", cache=None, client=None, node=(), arrays=None, **config):
        """Return what the hospital answers: the model's bits, or the metrics."""
        self.read.clear()
        message = {"split": "test"} if kind == "evaluate" else {}
        context = self.context(cache, node, **config)
        app = self.client if client is None else client
        reply = ask(app, kind, context, self.arrays() if arrays is None else arrays, **message)
        assert not reply.has_error(), reply.error.reason
        if kind == "train":
            return bits(reply.content["arrays"])
        return dict(reply.content["metrics"])

    def arrays(self):
        return model_arrays(lambda: self.client.build_model(None))

    def entries(self):
        return sorted(self.cache.iterdir()) if self.cache.exists() else []
