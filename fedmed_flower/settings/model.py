"""Settings that choose the network."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flwr.app import Context

from fedmed_flower.errors import InputError
from fedmed_flower.settings.section import Section, with_type_of


@dataclass(frozen=True)
class ModelSettings(Section):
    """Which network is trained, and which part of it, from the run config.

    Attributes
    ----------
    network : str
        Name of a network in ``monai.networks.nets``, such as ``UNet`` or ``resnet18``.
    network_args : str
        Arguments of the network as a TOML inline table or a JSON object, such as
        ``{spatial_dims = 3, in_channels = 1, out_channels = 3}``.
    bundle : str
        Folder of a MONAI bundle, used instead of `network`. Its config can run any code: name a
        folder whose origin you trust. A real hospital uses the folder that its node config names.
    trainable : str
        The part that is trained and travels, as in `fedmed_flower.models.trainable.Travelling`.
    """

    network: str = ""
    network_args: str = ""
    bundle: str = ""
    trainable: str = ""

    @classmethod
    def of_site(cls, context: Context) -> ModelSettings:
        """Read the settings; at a real hospital the bundle's folder comes from its node config.

        Raises
        ------
        InputError
            If the run asks for a bundle and the node config of a real hospital names none.
        """
        settings = cls.from_run_config(context.run_config)
        if not settings.bundle or not {"site-name", "data-dir"} & context.node_config.keys():
            return settings
        own = with_type_of("", context.node_config.get("bundle", ""), "bundle")
        if not own:
            raise InputError(
                "this run asks for a MONAI bundle, whose config runs code: the node config must "
                "name the hospital's own copy, bundle=FOLDER"
            )
        return replace(settings, bundle=own)
