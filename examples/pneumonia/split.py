"""Give each hospital a folder with its own images: python split.py FOLDER NAME [NAME ...]"""

import argparse
from pathlib import Path

import numpy as np

from fedmed_flower.data.partition import counts, dirichlet_shares, format_counts, split_by_shares
from fedmed_flower.data.sources import load_dataset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("names", nargs="+")
parser.add_argument("--dataset", default="pneumoniamnist", help="or breastmnist, phantoms")
parser.add_argument("--alpha", type=float, default=2.0, help="small: very unequal hospitals")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

images = load_dataset(options.dataset)
shares = dirichlet_shares(2, len(options.names), options.alpha, options.seed)
parts = {
    split: split_by_shares(labels, shares, options.seed, min_patients=int(split == "train"))
    for split, labels in images.labels.items()
}
for index, name in enumerate(options.names):
    arrays = {}
    for split, of_sites in parts.items():
        arrays[f"{split}_images"] = images.images[split][of_sites[index]]
        arrays[f"{split}_labels"] = images.labels[split][of_sites[index]]
    if images.generated:
        arrays["generated"] = np.array(True)
    file = options.folder / name / f"{options.dataset}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)
    print(file)
print(format_counts(counts(parts["train"], images.labels["train"])))
