"""Hospitals with their own key files, peers files and folders, as real ones have them."""

from fedmed_flower.secure.identity import Identity
from fedmed_flower.secure.study import Peers


def make_hospitals(folder, names, **study):
    """Make each hospital's folder, key and peers file; return their node configs, by name."""
    keys = folder / "keys"
    identities = {name: Identity.create(keys / f"{name}.key", name) for name in names}
    members = {name: identity.public for name, identity in identities.items()}
    configs = {}
    for name in names:
        Peers("trial", members, **study).save(keys / f"{name}.toml")
        (folder / "data" / name).mkdir(parents=True)
        configs[name] = {
            "site-name": name,
            "data-dir": str(folder / "data" / name),
            "secure-key": str(keys / f"{name}.key"),
            "secure-peers": str(keys / f"{name}.toml"),
        }
    return configs


def pin_another_key(folder, name, other):
    """Put a stranger's key in the place of a hospital's in another one's peers file.

    Returns
    -------
    Peers
        What the file held.
    """
    stranger = Identity.create(folder / "keys" / f"stranger-{name}.key", name)
    path = folder / "keys" / f"{other}.toml"
    honest = Peers.load(path)
    Peers("trial", {**honest.members, name: stranger.public}).save(path)
    return honest
