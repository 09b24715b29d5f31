import os
import sys

import hypothesis
import pytest

from fedmed_flower.data.site import simulation

# A busy machine takes longer for an example, and nothing is wrong.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """Tests on real data say why they are skipped; those of engines may leave files open."""
    for item in items:
        if item.get_closest_marker("slow"):
            for kind in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))
    if os.environ.get("FEDMED_DATA"):
        return
    for item in items:
        if item.get_closest_marker("realdata"):
            item.add_marker(pytest.mark.skip("FEDMED_DATA names no folder with real data"))


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
