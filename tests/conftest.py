import pytest

from fedmed_flower.data.site import simulation


@pytest.fixture(autouse=True)
def in_simulation():
    """Contexts that tests make by hand are those of a simulation in this process."""
    with simulation():
        yield
