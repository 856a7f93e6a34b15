"""The folder of converted models, compiled kernels and the results of checks of bases."""

import os
from pathlib import Path

from posttrain.errors import ModelError


def cache_folder() -> Path:
    """The cache folder: $POSTTRAIN_CACHE, else `posttrain` in the user's cache folder.

    Raises ModelError if neither is known.
    """
    explicit = os.environ.get("POSTTRAIN_CACHE")
    if explicit:
        return Path(explicit)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain"
    except RuntimeError:
        raise ModelError(
            "cache folder", "no home folder: HOME is not set, and the user has no entry in passwd",
            do="set POSTTRAIN_CACHE to a folder for converted models",
        ) from None  # fmt: skip
