"""Real hospitals with keys for secure sums, for tests."""

from tiny import nodes_of

from fedmed_flower.secure.identity import Identity, key_text


def keyed(folder, *names, **more):
    """Return node configs of real hospitals that have pinned each other's keys."""
    keys = {name: Identity.create(folder / f"{name}.key", name) for name in names}
    members = [f'{name} = "{key_text(key.public)}"' for name, key in keys.items()]
    study = folder / "peers.toml"
    study.write_text("\n".join(["[study]", 'name = "icu"', "[study.members]", *members]) + "\n")
    nodes = nodes_of(folder, *names, **more)
    for node, name in zip(nodes, names, strict=True):
        node |= {"secure-key": str(folder / f"{name}.key"), "secure-peers": str(study)}
    return nodes
