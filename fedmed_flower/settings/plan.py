"""How the server runs an experiment."""

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
        At least 1.
    round_timeout : float
        Seconds to wait in each phase, for replies and for the strategy's minimum of connected
        sites; above 0.
    min_sites : int
        Sites that must be connected before the run starts; at least 1.
    seed : int
        Of the initial weights and of the sampling of sites; at least 0.
    run_dir : str
        The run folder. Empty for a new one under ``runs/``.
    resume : bool
        Go on from the checkpoint in the run folder.
    baselines : bool
        Afterwards also train each site's model alone and, in a simulation, one model on all data
        pooled, each for as many rounds.
    pictures : int
        Test cases of each site that the report shows, and the worst beside them, where the site
        lets them leave; 0 asks for none.
    personal_epochs : int
        Most passes in which each site may fine-tune the last model for itself; 0 asks for none.
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
