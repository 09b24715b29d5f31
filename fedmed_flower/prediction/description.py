"""A client as plain data: what of it decides about a prediction.

An app's class adds to a base class of this package what it declares (classes, a schema, a modality)
and how it trains. What it declares is recorded here, with the settings of the run that prepare rows
and build the network. A client of the base class with the same declarations then prepares and
predicts as the app's own did, without the app. That does not hold if the app's class overrides a
method that takes part in a prediction; the names of such methods are recorded too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any

from flwr.app import Context, RecordDict, UserConfig

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.data.schema import Schema
from fedmed_flower.data.site import SiteData
from fedmed_flower.errors import InputError
from fedmed_flower.settings.registry import RUN, sections_of
from fedmed_flower.settings.section import Section, key_of

# The base classes, and the file of each, which is imported when a client needs it: MONAI takes
# seconds, which a run on tables does not need.
BASES = {
    "BagClient": "fedmed_flower.clients.bags",
    "ClassificationClient": "fedmed_flower.clients.classification",
    "FindingsClient": "fedmed_flower.clients.findings",
    "GradingClient": "fedmed_flower.clients.grading",
    "MeasurementClient": "fedmed_flower.clients.measurement",
    "SegmentationClient": "fedmed_flower.clients.segmentation",
    "SurvivalClient": "fedmed_flower.clients.survival",
    "TabularClient": "fedmed_flower.clients.tabular",
}
# Lists of names among what is declared.
_NAMES = ("classes", "findings", "grades")
_IMAGES = ("spatial_dims", "image_shape", "modality", "ct_window", "label_values")
# What a client declares that decides about a prediction.
_DECLARED: dict[str, tuple[str, ...]] = {
    "BagClient": (*_IMAGES, "num_classes"),
    "ClassificationClient": (*_IMAGES, "num_classes"),
    "FindingsClient": (*_IMAGES, "findings"),
    "GradingClient": (*_IMAGES, "grades"),
    "MeasurementClient": (*_IMAGES, "low", "high", "unit"),
    "SegmentationClient": (*_IMAGES, "classes", "regions", "overlap"),
    "TabularClient": ("schema", "zeros"),
    "SurvivalClient": ("schema", "zeros"),
}
# What files of earlier versions do not name, and its value in them.
_ADDED: dict[str, Any] = {"regions": {}}
_IMAGING_KEYS = (
    "spacing",
    "orientation",
    "image-size",
    "patch-size",
    "network",
    "network-args",
)
_TABLE_KEYS = (
    "preparation",
    "tabular-network",
    "network-width",
    "network-depth",
    "network-dropout",
)
_SURVIVAL_KEYS = ("survival-loss", "survival-horizon", "survival-intervals")
# The settings of a run that decide about a prediction.
_KEYS: dict[str, tuple[str, ...]] = {
    "BagClient": (*_IMAGING_KEYS, "patch-features", "attention-size", "torch-threads"),
    "ClassificationClient": (*_IMAGING_KEYS, "torch-threads"),
    "FindingsClient": (*_IMAGING_KEYS, "torch-threads"),
    "GradingClient": (*_IMAGING_KEYS, "torch-threads"),
    "MeasurementClient": (*_IMAGING_KEYS, "torch-threads"),
    "SegmentationClient": (*_IMAGING_KEYS, "torch-threads"),
    "TabularClient": (*_TABLE_KEYS, "torch-threads"),
    "SurvivalClient": (*_TABLE_KEYS, *_SURVIVAL_KEYS, "torch-threads"),
}
# Members of the base classes that take no part in a prediction: an app's class may override them.
# `build_model` is recorded by itself.
_FREE = frozenset(
    """
    load_data build_model check warn screen label_of describe draw made_up probe
    must_agree contribute columns_to_sum agree outlying class_names
    fit measure metrics_of_rows batch_of loss_of loss targets augment random_transforms
    seed_transforms check_private measure_privately require_measurable
    client_app queries stand_ins sections node_keys prepared_for run_cache pooled_data
    cam_layer empty_masks surface_tolerance
    """.split()  # noqa: SIM905
)


class UndescribedError(Exception):
    """A model of which no predictor can be made; the text says why and what to do."""


@dataclass(frozen=True)
class Description:
    """What decides about a prediction, beside the network.

    Attributes
    ----------
    base : str
        The nearest base class, a key of `BASES`.
    name : str
        The app's class.
    declared : dict
        Attributes of the client, by name, as JSON holds them.
    settings : dict
        Settings of the run, by key. Those of the app's own sections are among them.
    agreed : str
        The preparation that hospitals have agreed upon; empty if there is none.
    overridden : tuple of str
        Methods of the app's class that take part in a prediction and are not the base class's.
    builds : bool
        Whether the app's class builds the network, or the network is a bundle's.
    """

    base: str
    name: str
    declared: Mapping[str, Any]
    settings: UserConfig
    agreed: str
    overridden: tuple[str, ...]
    builds: bool

    @classmethod
    def of(cls, model: Any) -> Description:
        """Describe the client that made a run's model.

        Parameters
        ----------
        model : MedicalClient or callable
            A client, or a method of one, such as its `build_model`.

        Raises
        ------
        UndescribedError
            If it is neither, or a client of another kind of rows.
        """
        client = getattr(model, "__self__", model)
        kinds = ", ".join(BASES)
        if not isinstance(client, MedicalClient):
            raise UndescribedError(
                "federate was given a function that returns the network, of which nobody knows how "
                "rows are prepared: give it an instance of the app's client, MyHospital(context)"
            )
        kind = _nearest(type(client))
        if kind is None:
            raise UndescribedError(
                f"{type(client).__name__} is none of {kinds}, so its rows are the app's own: load "
                "model.safetensors into its build_model"
            )
        base = kind.__name__
        settings = _settings_of(client, base)
        if settings.get("preparation") == "site":
            raise UndescribedError(
                'with preparation="site" each hospital prepares its rows by its own training rows, '
                'which nobody else has: train with "federated" or "declared"'
            )
        own = [part for part in type(client).__mro__ if part not in kind.__mro__]
        names = {name for part in own for name in vars(part)}
        # A method that an instance was given is overridden too.
        names |= {name for name in vars(client) if callable(getattr(kind, name, None))}
        # Python's own entries of each class begin so.
        members = {name for name in names if not name.startswith(("__", "_abc_"))}
        hooks = {name for name in members if hasattr(kind, name)}
        return cls(
            base,
            type(client).__name__,
            {name: _plain(name, getattr(client, name)) for name in _DECLARED[base]},
            settings,
            client.agreed,
            tuple(sorted(hooks - _FREE - {*_DECLARED[base]} - {"num_classes"})),
            type(client).build_model is not kind.build_model or bool(client.models.bundle),
        )

    @classmethod
    def read(cls, content: Any) -> Description:
        """Return the description that `asdict` of one gave, which may come from a stranger.

        Raises
        ------
        InputError, KeyError, TypeError, ValueError
            If it is not one.
        """
        base = content["base"]
        if base not in BASES:
            raise ValueError(f"base must be one of {', '.join(BASES)}, got {str(base)[:100]!r}")
        settings = dict(content["settings"])
        if not all(isinstance(value, bool | int | float | str) for value in settings.values()):
            raise ValueError("settings must be numbers, booleans and texts")
        added = {name: value for name, value in _ADDED.items() if name in _DECLARED[base]}
        declared = added | dict(content["declared"])
        if declared.keys() != {*_DECLARED[base]}:
            raise ValueError(f"declared must hold {', '.join(_DECLARED[base])}")
        for name, value in declared.items():
            _read(name, value)
        return cls(
            base,
            str(content["name"])[:200],
            declared,
            {str(key): value for key, value in settings.items()},
            str(content["agreed"]),
            tuple(map(str, content["overridden"])),
            bool(content["builds"]),
        )

    def client(self, device: str, app: type[MedicalClient] | None = None) -> MedicalClient:
        """Return a client that prepares rows and predicts as the run's did.

        Parameters
        ----------
        device : str
            As the setting ``device``.
        app : type of MedicalClient, optional
            The app's own class.

        Raises
        ------
        InputError
            If the app's class overrides what takes part in a prediction and `app` is not given. If
            `app` is another class than that of the run, or declares something else. If what is
            declared is out of its range.
        """
        if self.overridden and app is None:
            raise InputError(
                f"{self.name} defines {', '.join(self.overridden)} itself, which decides about a "
                "prediction: give the folder of the app, --app FOLDER"
            )
        kind: type[MedicalClient] = getattr(import_module(BASES[self.base]), self.base)
        declared = {name: _read(name, value) for name, value in self.declared.items()}
        made = app or type(self.name, (kind,), {**declared, "load_data": _without_rows})
        if not issubclass(made, kind) or made.__name__ != self.name:
            raise InputError(
                f"the client of the app is {made.__name__}, and that of the run is a {self.base} "
                f"named {self.name}: give the app of the run"
            )
        # Of a stranger's settings no other counts: one of them names a folder whose code is run.
        own = [part for part in sections_of(made) if part not in RUN]
        known = {*_KEYS[self.base], *(key_of(entry.name) for part in own for entry in fields(part))}
        settings = {key: value for key, value in self.settings.items() if key in known}
        settings["device"] = device
        client = made(
            Context(0, 0, {"site-name": "prediction", "image-cache": "off"}, RecordDict(), settings)
        )
        client.agreed = self.agreed
        for name, value in self.declared.items():
            found = _plain(name, getattr(client, name))
            if found != value:
                raise InputError(
                    f"{name} of {made.__name__} is {found!r} and was {value!r} in the run: give "
                    "the app as it was"
                )
        client.check(SiteData(()))
        return client


def _nearest(cls: type[Any]) -> type[Any] | None:
    """Return the first of the base classes that a class inherits from; None if there is none."""
    for part in cls.__mro__:
        if BASES.get(part.__name__) == part.__module__:
            return part
    return None


def _settings_of(client: MedicalClient, base: str) -> UserConfig:
    """Return the settings that decide about a prediction, as the client holds them."""
    held: list[Section] = [client.settings, client.models]
    for name in ("imaging", "bags", "tables", "survival"):
        if hasattr(client, name):
            held.append(getattr(client, name))
    values: UserConfig = {}
    for part in held:
        values |= part.values()
    settings = {key: values[key] for key in _KEYS[base]}
    for section in sections_of(type(client)):
        if section not in RUN:
            settings |= section.from_run_config(client.context.run_config).values()
    return settings


def _without_rows(self: MedicalClient, site: Any) -> SiteData:
    raise InputError("this client predicts rows that it is given, and has none of its own")


def _plain(name: str, value: Any) -> Any:
    """Return a declared value as JSON holds it."""
    if isinstance(value, Schema):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(name, part) for key, part in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(name, part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "item"):  # A number of NumPy's.
        return value.item()
    raise UndescribedError(f"{name} holds a {type(value).__name__}, which cannot be written down")


def _read(name: str, value: Any) -> Any:
    """Return a declared value of a file in the form in which a client declares it."""
    if name == "schema":
        return _schema(value)
    wanted: dict[str, tuple[type, ...]] = {
        "spatial_dims": (int,),
        "num_classes": (int,),
        "modality": (str,),
        "overlap": (int, float),
        "zeros": (bool,),
        "low": (int, float),
        "high": (int, float),
        "unit": (str,),
    }
    if name in wanted:
        if type(value) not in wanted[name]:
            raise ValueError(f"{name} must not be {str(value)[:100]!r}")
        return value
    if name == "regions":
        return {str(region): _list(name, numbers, (int,)) for region, numbers in value.items()}
    # What is left are lists of numbers, or of names.
    kind: tuple[type, ...] = (str,) if name in _NAMES else (int, float)
    return _list(name, value, kind)


def _list(name: str, value: Any, kind: tuple[type, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list) or not all(type(part) in kind for part in value):
        raise ValueError(f"{name} must be a list, got {str(value)[:100]!r}")
    return tuple(value)


def _schema(content: Any) -> Schema:
    known = {entry.name for entry in fields(Schema)}
    given = {str(key): _tuples(value) for key, value in dict(content).items()}
    if not given.keys() <= known:
        raise ValueError(f"a schema has no {min(given.keys() - known)}")
    return Schema(**given)


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    if isinstance(value, dict):
        return {str(key): _tuples(part) for key, part in value.items()}
    return value
