"""What makes sure that a file is on disk, whatever happens next; left out: what is written, and in which order."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
