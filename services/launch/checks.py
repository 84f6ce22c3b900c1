"""What can be known to be wrong before anything is started: each is one line that says what to do."""

from __future__ import annotations

import socket
from pathlib import Path


class StartError(Exception):
    """Nothing can be served as asked; the message is one line."""


def check_model(path: Path) -> None:
    """`path` must look like a GGUF file or a Hugging Face folder; whether it is served shows on loading."""
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StartError(f"MODEL={path} is a folder without config.json, so no Hugging Face model")
        return
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise StartError(f"MODEL={path} does not exist; `make model` fetches the demo model") from None
    except OSError as error:
        raise StartError(f"MODEL={path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise StartError(f"MODEL={path} is neither a GGUF file nor a Hugging Face folder")


def check_port(host: str, port: int) -> None:
    """`port` must be free on `host` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the router does
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            raise StartError(
                f"port {port} on {host} cannot be had: {error.strerror}; choose another, PORT={port + 1} say"
            ) from error
