"""Weight files from an address, fetched once into the cache of `torch.hub`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch

_CACHE_FOLDER = "checkpoints"
_TIMEOUT_SECONDS = 30.0


def is_url(text: str) -> bool:
    """Return whether a string is an address and not a path."""
    return text.startswith(("https://", "http://", "file://"))


def cached_file(url: str, *, sha256: str | None = None, name: str | None = None) -> Path:
    """Return the file at `url` in the cache of `torch.hub`, after fetching it where it is not there yet.

    Args:
        url: where it is.
        sha256: what its bytes must hash to, 64 hexadecimal digits; checked after the download, and of a file that is
            there already. None: not checked.
        name: of the file in the cache; None for the last part of the address behind a few digits that tell addresses
            apart.

    Raises:
        OSError: if it cannot be fetched; says where the file belongs.
        ValueError: if its bytes are not those expected.
    """
    path = Path(torch.hub.get_dir()) / _CACHE_FOLDER / (name or _cache_name(url))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise OSError(f"cannot download {url} ({error}); put that file at {path} yourself") from error
    if sha256 is not None and (found := sha256_of_file(path)) != sha256.lower():
        raise ValueError(
            f"{path} has the SHA-256 {found}, expected {sha256.lower()}: it is damaged or another file. Delete it and "
            "load again"
        )
    return path


def _cache_name(url: str) -> str:
    return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{url.rsplit('/', 1)[-1]}"


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_json(url: str) -> Any:
    """Return the content of a JSON file at an address.

    Raises:
        OSError: if it cannot be fetched.
        ValueError: if it is no JSON.
    """
    try:
        with urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            return json.load(response)
    except OSError as error:
        raise OSError(f"cannot read {url} ({error}); check the address and the network") from error
