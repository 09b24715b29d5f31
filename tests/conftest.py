import os
import sys
from pathlib import Path

import hypothesis
import pytest

from fedmed_flower.data.site import simulation

CHROMIUM = Path("/usr/bin/chromium")

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


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Real hospitals of tests keep their images in no folder of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _alone():
    """Let each app find its own modules: all examples name theirs alike.

    What a fixture of a whole module has loaded does not stay either, for that of the next module.
    """
    path, names = list(sys.path), ("client_app", "server_app")
    for name in names:
        sys.modules.pop(name, None)
    yield
    sys.path[:] = path
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"needs a browser at {CHROMIUM}")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=str(CHROMIUM),
            args=["--no-sandbox", "--no-proxy-server", "--disable-dev-shm-usage"],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """Return a function that opens an address, with options of a context of the browser.

    Nothing else may be asked for, and nothing be said in the console.
    """
    said, contexts = [], []

    def visit(url, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        # A busy machine takes long to load torch.
        page.set_default_timeout(300_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda request: request.url.startswith(url) or said.append(request.url))
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert said == []
