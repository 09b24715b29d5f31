"""What autodoc shows of the public classes, and links to them.

Links from a class's own module to the page of the public name:

A signature names ``fedmed_flower.clients.base.MedicalClient``; the reference has it as
``fedmed_flower.clients.MedicalClient``. What is there but not public stays text.
"""

import inspect
import re
import sys
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from pkgutil import resolve_name

import generated_pages
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from fedmed_flower import MedicalClient
from fedmed_flower.strategies import FedAvg

OWN = "fedmed_flower."
RECIPES = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def public_names() -> dict[str, str]:
    """Return the public name of each public object, by module and name."""
    found = {}
    for room in generated_pages.rooms():
        for name in generated_pages.names_of(room):
            thing = getattr(import_module(room), name)
            found[f"{thing.__module__}.{name}"] = f"{room}.{name}"
            found[f"fedmed_flower.{name}"] = f"{room}.{name}"
    return found


def resolve(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Return a link to the public name, text for what is not public, None for what is missing."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("fedmed_flower"):
        return None
    names = app.config.public_names
    public = next((name for name in names if target == name or target.startswith(f"{name}.")), None)
    if public is not None:
        domain = env.get_domain("py")
        renamed = names[public] + target.removeprefix(public)
        if names[public] != public:
            found = domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", renamed, node, content
            )
            if found is not None:
                return found
    try:
        resolve_name(target)
    except (ImportError, AttributeError, ValueError):
        return None
    return content


def split_attributes(
    app: Sphinx, kind: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Give each of several attributes that a docstring describes at once a line of its own.

    Napoleon would take the first of them for the type of the last.
    """
    if "Attributes" not in lines:
        return
    start = lines.index("Attributes") + 2
    ends = [n for n in range(start + 1, len(lines)) if re.fullmatch(r"-{3,}", lines[n])]
    stop = ends[0] - 1 if ends else len(lines)
    split: list[str] = []
    for number in range(start, stop):
        found = re.fullmatch(r"(\w+(?:, \w+)+)( :.*)?", lines[number])
        if found is None:
            split.append(lines[number])
            continue
        about = list(takewhile(lambda line: line.startswith(" "), lines[number + 1 : stop]))
        *others, last = found[1].split(", ")
        for other in others:
            split += [f"{other}{found[2] or ''}", *about]
        split.append(f"{last}{found[2] or ''}")
    lines[start:stop] = split


def shorten_signature(
    app: Sphinx, kind: str, name: str, thing: object, options: object, given: str, returned: str
) -> tuple[str, str] | None:
    """Write the default of a dataclass's list or dict so that Sphinx can read the signature."""
    if given and "<factory>" in given:
        return re.sub(r"~[\w.]+\.", "", given).replace("<factory>", "..."), returned
    return None


def escape_stars(
    app: Sphinx, kind: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Keep the star of a shape such as (batch, *spatial) from beginning an emphasis."""
    for number, line in enumerate(lines):
        # Every second part stands within backticks.
        parts = re.split(r"(`+[^`]*`+)", line)
        parts[::2] = [re.sub(r"(?<![\w*\\])\*(?=\w+[^*\w])", r"\\*", part) for part in parts[::2]]
        lines[number] = "".join(parts)


def is_hook(owner: type, name: str) -> bool:
    """Say whether a method of a client or a strategy is one to call or override.

    Those are the methods that a docstring of the class, or a recipe of CONTRIBUTING, names.
    """
    said = "\n".join(
        base.__doc__ or "" for base in owner.__mro__ if base.__module__.startswith(OWN)
    )
    # A line of names, such as those under Hooks and Attributes, or a name as code.
    listed = re.search(rf"^[ ]*(\w+, )*{name}(, \w+)*( :.*)?$|`{name}`", said, re.MULTILINE)
    return bool(listed or re.search(rf"(`|\.|def ){name}\b", RECIPES))


def leave_out(
    app: Sphinx, kind: str, name: str, thing: object, skip: bool, options: object
) -> bool | None:
    """Leave out what a client or a strategy has for the package alone."""
    home = getattr(inspect.unwrap(getattr(thing, "fget", None) or thing), "__qualname__", "")
    owner = getattr(
        sys.modules.get(getattr(thing, "__module__", ""), None), home.split(".")[0], None
    )
    if inspect.isclass(owner) and issubclass(owner, (MedicalClient, FedAvg)):
        return skip or not is_hook(owner, name)
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_config_value("public_names", public_names(), "")
    app.connect("missing-reference", resolve)
    # Before napoleon reads the docstring.
    app.connect("autodoc-process-docstring", split_attributes, priority=400)
    app.connect("autodoc-process-docstring", escape_stars)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-skip-member", leave_out)
    return {"parallel_read_safe": True}
