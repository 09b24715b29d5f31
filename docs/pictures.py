"""Make the pictures of these pages from a small run: `python docs/pictures.py`.

Needs Chromium: the path in CHROMIUM, else the first of chromium, chromium-browser and google-chrome
that is there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
PICTURES = HERE / "pictures"
MOST_BYTES = 250_000
# Width and height of the window, in pixels.
WIDE = (1200, 900)
NARROW = (400, 800)
RUN = [
    *("run", str(HERE.parent / "examples" / "pneumonia")),
    *("-c", "dataset=phantoms", "-c", "baselines=true", "--sites", "4", "--rounds", "3"),
]


def chromium() -> str:
    """Return the path of the browser."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    for name in names:
        if path := shutil.which(name):
            return path
    raise SystemExit("there is no Chromium: give its path in the variable CHROMIUM")


def small_run(folder: Path) -> Path:
    """Run an example on generated images; return the run folder."""
    code = "from fedmed_flower.cli.main import main; main()"
    command = [sys.executable, "-c", code, *RUN, "--out", str(folder / "run")]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    subprocess.run(command, check=True, env=environment, cwd=folder)
    return folder / "run"


def write_small(source: Path, target: Path) -> None:
    """Write a picture with as many colours as fit into the bound."""
    with Image.open(source) as picture:
        plain = picture.convert("RGB")
    for colours in (256, 128, 64, 32):
        plain.quantize(colours, dither=Image.Dither.NONE).save(target, optimize=True)
        if target.stat().st_size < MOST_BYTES:
            print(f"{target}: {target.stat().st_size:,} bytes, {colours} colours")
            return
    raise SystemExit(f"{target} has {target.stat().st_size:,} bytes: shoot a smaller part")


def shoot(page: Page, name: str, scale_to: tuple[int, int]) -> None:
    """Write the top of a page as a picture, once the page stands still."""
    page.set_viewport_size({"width": scale_to[0], "height": scale_to[1]})
    page.wait_for_load_state("networkidle")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.png"
        page.screenshot(path=raw, animations="disabled")
        write_small(raw, PICTURES / name)


def main() -> None:
    """Make all pictures."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as tools:
        run = small_run(Path(folder))
        # Chromium's own sandbox needs rights that a container may lack; the page is our own.
        browser = tools.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for scheme, suffix in (("light", ""), ("dark", "-dark")):
            page = browser.new_page(color_scheme=scheme)
            page.goto((run / "report.html").as_uri())
            shoot(page, f"report{suffix}.png", WIDE)
            shoot(page, f"report-narrow{suffix}.png", NARROW)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
