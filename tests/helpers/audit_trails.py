"""Audit trails of a made-up run, as honest hospitals and an honest server write them."""

from fedmed_flower.secure.audit import Chain
from fedmed_flower.secure.encoding import digest
from fedmed_flower.secure.identity import Identity

NAMES = ("north", "south", "west")
RUN = "ab12"


def identity(name):
    return Identity.simulated(name, "test")


class Trails:
    """Trails of three hospitals and a server in a folder; each method is one step of a run."""

    def __init__(self, folder, names=NAMES, run=RUN):
        self.folder = folder
        self.run = run
        self.names = names
        self.chains = {name: Chain(self.path(name), identity(name), name) for name in names}
        self.server = Chain(folder / "run" / "audit.jsonl", None, "server")

    def path(self, name):
        return self.folder / name / f"{name}.audit"

    def files(self):
        return [*(chain.path for chain in self.chains.values()), self.server.path]

    def entries(self):
        chains = {"the server": self.server, **self.chains}
        return {name: Chain.read(chain.path) for name, chain in chains.items()}

    def hello(self):
        heads = {name: chain.head for name, chain in self.chains.items()}
        for name, chain in self.chains.items():
            chain.append("hello", {"run": self.run, "key": name.encode(), "heads": heads})

    def sent(self, number, name, attempt=0, purpose="train", **changed):
        """Append what one hospital, or the server, says that all were told."""
        model = changed.pop("model", digest(["model", number]).hex())
        about = {
            "run": self.run,
            "round": number,
            "purpose": purpose,
            "names": list(self.names),
            "model": model,
            "question": digest(["question", model, purpose]),
            **changed,
        }
        about.setdefault("digest", digest(["record", about, attempt]))
        chain = self.server if name == "server" else self.chains[name]
        chain.append("sent", about)
        return about["digest"]

    def masked(self, number, name, record):
        about = {"run": self.run, "round": number, "digest": record, "masked": digest(name)}
        self.chains[name].append("masked", about)

    def opened(self, number, name, record, members=None):
        members = list(members or self.names)
        about = {"run": self.run, "round": number, "digest": record, "members": members}
        chain = self.server if name == "server" else self.chains[name]
        chain.append("opened", about)

    def round(self, number, **changed):
        """Append a whole round; `changed` is as in `sent`."""
        record = self.sent(number, "server", **changed)
        for name in self.names:
            self.sent(number, name, **changed)
            self.masked(number, name, record)
        for name in (*self.names, "server"):
            self.opened(number, name, record)
        self.server.append(
            "model", {"run": self.run, "round": number, "model": digest(["model", number + 1])}
        )


def finished(folder, rounds=3):
    """Return the trails of a run in which nothing differs."""
    trails = Trails(folder)
    trails.hello()
    for number in range(1, rounds + 1):
        trails.round(number)
    return trails
