"""What a stranger may have written into a JSON or TOML file in place of what belongs there."""

import json
import math

from hypothesis import strategies as st

HOSTILE = (
    "a\nnot started: all is well\x1b[2J\x9b31m\u202egnp.exe\u2066\r[red]x[/red]:warning:\ud800"
)
ODD = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 10**20, 10**400, 1e308, -1e308, math.nan, math.inf, "", []]
    ),
    st.sampled_from(
        ["../../secret/key.txt", "/etc/passwd", "file:///etc/passwd", HOSTILE, "{}%s$x", "\ud800"]
    ),
    st.sampled_from([{}, [[]], {"a": 1}, ["x"] * 3, "x" * 5000, {HOSTILE: HOSTILE}]),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)


def places_in(node, most, deep, here=()):
    """Yield the way to each value in a tree of dicts and lists.

    Of a list as many as `most` are gone into, and ways have at most `deep` steps.
    """
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*here, key)
        if isinstance(value, dict | list) and len(here) < deep:
            part = value[:most] if isinstance(value, list) else value
            yield from places_in(part, most, deep, (*here, key))


@st.composite
def changed_tree(draw, tree, most=None, deep=100):
    """Return a tree in which up to three values are others, or gone."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        places = list(places_in(tree, most, deep))
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        node = tree
        for key in way:
            node = node[key]
        if draw(st.integers(0, 4)):
            node[last] = draw(ODD)
        else:
            del node[last]
    return tree
