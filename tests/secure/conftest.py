import shutil
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def folder():
    """A folder in memory where there is one: books write to the disk at each step."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    yield path
    shutil.rmtree(path)
