"""An empty cache of `torch.hub`, and a server on this machine."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder into which `torch.hub` downloads, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


class Server(NamedTuple):
    """A folder that is served, its address, and the paths that were asked for."""

    folder: Path
    address: str
    asked: list[str]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Serve a folder over HTTP."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield Server(folder, f"http://127.0.0.1:{httpd.server_port}", asked)
        httpd.shutdown()
        thread.join()
