"""Settings by which the server runs an experiment."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.errors import InputError
from fedmed_flower.settings.section import Section


@dataclass(frozen=True)
class Plan(Section):
    """How the server runs an experiment, from the run config (``run-dir`` there is `run_dir` here).

    Attributes
    ----------
    num_server_rounds : int
        Number of rounds; at least 1.
    round_timeout : float
        Seconds to wait in each phase, for replies and for the sites that the strategy needs; above
        0.
    min_sites : int
        Number of sites that must be connected before the run starts; at least 1.
    seed : int
        Seed of the initial weights and of the sampling of sites; at least 0.
    run_dir : str
        The run folder. If empty, a new one is made under ``runs/``.
    resume : bool
        Continue from the checkpoint in the run folder.
    baselines : bool
        After the run, also train a model at each site alone and, in a simulation, one on all data
        pooled, each for as many rounds.
    pictures : int
        Number of test cases per site that the report shows, besides the worst one, if the site lets
        pictures leave; 0 asks for no pictures.
    personal_epochs : int
        Largest number of passes in which each site may fine-tune the last model for itself; 0 asks
        for no such model.
    """

    num_server_rounds: int = 3
    round_timeout: float = 3600.0
    min_sites: int = 1
    seed: int = 0
    run_dir: str = ""
    resume: bool = False
    baselines: bool = False
    pictures: int = 3
    personal_epochs: int = 0

    def __post_init__(self) -> None:
        self.require_at_least(1, "num_server_rounds", "min_sites")
        self.require_at_least(0, "seed", "pictures", "personal_epochs")
        self.require_positive("round_timeout")
        if self.resume and not self.run_dir:
            raise InputError("resume needs run-dir, the folder of the run to go on with")
