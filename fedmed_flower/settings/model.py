"""Settings that choose the network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedmed_flower.settings.allowed import OneOf, Within
from fedmed_flower.settings.section import Section, setting
from fedmed_flower.settings.text import setting_error, with_type_of

if TYPE_CHECKING:
    from flwr.app import Context


@dataclass(frozen=True)
class ModelSettings(Section):
    """Which network is trained, and which part of it."""

    network: str = setting(
        "", "Name of a network in monai.networks.nets, such as UNet or resnet18."
    )
    network_args: str = setting(
        "",
        "The network's arguments, as a TOML inline table or a JSON object, such as "
        "{spatial_dims = 3, in_channels = 1, out_channels = 3}.",
    )
    bundle: str = setting(
        "",
        "Folder of a MONAI bundle, in place of network. Its config can run any code: name a folder "
        "whose origin you trust. A real site takes the folder that its own node config names.",
    )
    trainable: str = setting(
        "",
        "Which part travels and is trained: patterns for the names of parameters, with commas "
        "between them, such as *.decoder.*. Empty: all of it, or with lora the "
        "adapters alone.",
    )
    lora: str = setting(
        "",
        "Linear layers and convolutions that get a low-rank adapter (LoRA): patterns for their "
        "names, with commas between them, such as *.qkv,*.out_proj. The adapters are trained and "
        "travel, with what trainable names besides; the rest is frozen. Empty: none.",
    )
    lora_rank: int = setting(
        4, "Rank of the adapters: the higher, the more weights are trained.", Within(1, 10_000)
    )
    lora_alpha: float = setting(
        4.0,
        "Weight of the adapters: alpha / rank times their product is added to a layer's weights.",
        Within(0.0, above=True),
    )
    lora_train: str = setting(
        "ab",
        "What of an adapter B A is trained and travels. b: B alone (FFA-LoRA); A stays as it was "
        "drawn, so that the mean of adapters is that of the networks.",
        OneOf(("ab", "b")),
    )

    @classmethod
    def of_site(cls, context: Context) -> ModelSettings:
        """Read the settings, the bundle's folder of a real site from its own node config.

        Raises
        ------
        InputError
            If the run asks for a bundle and the site's node config names none.
        """
        settings = cls.from_run_config(context.run_config)
        if not settings.bundle or not {"site-name", "data-dir"} & context.node_config.keys():
            return settings
        bundle = with_type_of("", context.node_config.get("bundle", ""), "bundle")
        if not bundle:
            raise setting_error(
                "this run asks for a MONAI bundle, whose config runs code: the node config must "
                "name the hospital's own copy, bundle=FOLDER",
                "bundle",
            )
        return replace(settings, bundle=bundle)
