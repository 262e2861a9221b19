"""Whether huggingface.co can be reached, asked before a library tries for a minute."""

import os
import socket
import urllib.request
from collections.abc import Sequence
from urllib.parse import urlsplit

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def require_reachable(repository: str, files: Sequence[str] = WEIGHT_FILES, *, revision: str | None = None) -> None:
    """Say at once that a file can neither be downloaded nor is in the cache; its own library retries for a minute.

    Behind a proxy, and where the hub's library is told to stay offline, the question is left to that library.

    Args:
        repository: ``org/name`` on huggingface.co.
        files: Names of which any in the cache will do.
        revision: Branch, tag or commit; None for the main branch.

    Raises:
        OSError: If the name of the server is not known here and none of ``files`` is in the cache.
    """
    from huggingface_hub import try_to_load_from_cache

    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname or ""
    if os.environ.get("HF_HUB_OFFLINE") or urllib.request.getproxies():
        return
    if any(isinstance(try_to_load_from_cache(repository, name, revision=revision), str) for name in files):
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise OSError(
            f"{host} cannot be reached ({error.strerror or error}), and {repository} is not in the cache; check the "
            f"connection, or give the path of a copy"
        ) from None
