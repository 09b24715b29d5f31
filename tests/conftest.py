import sys

import pytest

from fedmed_flower.data.site import simulation


@pytest.fixture(autouse=True)
def in_simulation():
    """Contexts that tests make by hand are those of a simulation in this process."""
    with simulation():
        yield


@pytest.fixture(autouse=True)
def _alone():
    """Let each app find its own modules: all examples name theirs alike."""
    path, names = list(sys.path), ("client_app", "server_app")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield
    sys.path[:] = path
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)
