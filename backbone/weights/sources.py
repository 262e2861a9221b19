"""Where weights come from: a path, a library's own names, or an address with the hash of what must be there."""

import hashlib
import http.client
import os
import re
import urllib.request
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.response import addinfourl

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from backbone.providers.hub import require_reachable
from backbone.weights.formats import timm, torchvision
from backbone.weights.reading import CHECKPOINT_SUFFIXES, MAX_FILE_BYTES, Checkpoint, read_checkpoint
from backbone.weights.writing import put_in_place

URL_SCHEMES: Final = ("http://", "https://", "file://")
HUGGING_FACE: Final = "hf://"
PACKAGE: Final = "package://"
TIMEOUT: Final = 30  # seconds without a byte
CHUNK: Final = 2**20  # bytes
_NOT_SATISFIABLE: Final = 416  # of HTTP: nothing lies beyond what was asked for
_PARTIAL: Final = 206  # of HTTP: the answer begins where it was asked to


def is_location(source: str | os.PathLike[str]) -> bool:
    """Whether ``source`` says where a file is, rather than what its library calls it."""
    text = os.fspath(source)
    return text.startswith((*URL_SCHEMES, HUGGING_FACE, PACKAGE)) or Path(text).suffix in CHECKPOINT_SUFFIXES


def open_source(source: str | os.PathLike[str], name: str | None = None) -> Checkpoint:
    """Read the checkpoint that ``source`` names, downloading it if need be; kinds as in ``load_weights``.

    Args:
        source: Where it is.
        name: Network that a bare torchvision weights name belongs to; without one, anything else is a path.

    Raises:
        FileNotFoundError: If the path does not exist.
        OSError: If a download fails.
        ImportError: If the source needs a library that is not installed.
        ValueError: If it is none of these or its content is damaged, unsafe or not what the hash says.
    """
    text = os.fspath(source)
    if text.startswith(URL_SCHEMES):
        return read_checkpoint(download(text))
    if text.startswith(HUGGING_FACE):
        return read_checkpoint(_from_hugging_face(text))
    if text.startswith(PACKAGE):
        return read_checkpoint(_in_package(text))
    if text.startswith(timm.PREFIX) and not Path(text).exists():
        return timm.download(text)
    if is_location(text) or (name is None and "_Weights." not in text):
        return read_checkpoint(Path(text))
    return torchvision.download(name or "", text)


def download(address: str) -> Path:
    """Return the cached file of ``<url>#sha256=<digest>``, fetching what is missing of it.

    An interrupted download goes on where it ended, and counts only if the whole has the hash. Processes that want
    the same file wait for each other.

    Raises:
        OSError: If the server cannot be reached or ends early; run again to resume.
        ValueError: If the address has no hash, or the file another one.
    """
    url, _, digest = address.partition("#sha256=")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(
            f"a URL must end in #sha256= and the 64 hex digits of its file's hash, got {address!r}; add it"
        )
    origin = Path(unquote(urlsplit(url).path)).name or "weights"
    cached = Path(torch.hub.get_dir(), "checkpoints", f"{digest[:16]}-{origin}")
    cached.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cached}.lock"):
        if not (cached.is_file() and _sha256(cached) == digest):
            part = cached.with_name(f"{cached.name}.part")
            _fetch(url, part)
            found = _sha256(part)
            if found != digest:
                part.unlink()
                raise ValueError(f"{url}: must have the sha256 {digest}, got {found}; check both, nothing was kept")
            put_in_place(part, cached)
    return cached


def _fetch(url: str, part: Path) -> None:
    """Append to ``part`` what it lacks of ``url``."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            start = start if response.status == _PARTIAL else 0
            length = int(response.headers.get("Content-Length") or -1)
            if start + length > MAX_FILE_BYTES:
                raise ValueError(f"{url}: a checkpoint must be at most {MAX_FILE_BYTES} bytes, got {start + length}")
            received = _copy(response, part, start, start + length if length >= 0 else None)
    except HTTPError as error:
        if error.code == _NOT_SATISFIABLE:
            return  # it is all there; the hash tells
        raise OSError(f"{url}: cannot be downloaded, the server answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: cannot be downloaded ({error}); check the connection, run again to resume") from None
    if length >= 0 and received != start + length:
        raise OSError(f"{url}: ended after {received} of {start + length} bytes; run again to resume")


def _copy(response: addinfourl, part: Path, start: int, total: int | None) -> int:
    """Write the answer behind the first ``start`` bytes of ``part``; return how many there are then."""
    columns = (TextColumn(part.stem), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        part.open("r+b" if start else "wb") as file,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("download", total=total, completed=start)
        file.seek(start)
        while chunk := response.read(CHUNK):
            file.write(chunk)
            progress.update(task, advance=len(chunk))
            if file.tell() > MAX_FILE_BYTES:
                raise ValueError(f"{response.url}: a checkpoint must be at most {MAX_FILE_BYTES} bytes")
        return file.tell()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_hugging_face(address: str) -> Path:
    """Return the cached file of ``hf://org/repo/file`` or ``hf://org/repo@revision/file``."""
    found = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", address)
    if not found:
        raise ValueError(f"an address at Hugging Face must be hf://org/repo/file, got {address!r}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ImportError(f"{address} needs huggingface_hub; install it with: pip install huggingface_hub") from None
    repository, revision, file = found.groups()
    require_reachable(repository, [file], revision=revision)
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # its own errors are of many kinds, HTTP clients' among them
        raise OSError(f"{address}: cannot be downloaded: {' '.join(str(error).split())}") from None


def _in_package(address: str) -> Path:
    """Return the file of ``package://<package>/<path>``, one that an installed Python package carries.

    The package is found, not imported.
    """
    package, _, file = address.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier() or not file or ".." in PurePosixPath(file).parts:
        raise ValueError(f"a file in a package must be package://<package>/<path in it>, got {address!r}")
    found = find_spec(package)
    folders = list(found.submodule_search_locations or ()) if found else []
    if not folders:
        raise ModuleNotFoundError(f"{address} needs the package {package}; install it with: pip install {package}")
    held = next((path for folder in folders if (path := Path(folder, file)).is_file()), None)
    if held is None:
        raise FileNotFoundError(
            f"{address}: weights must be an existing file, and {folders[0]} holds no {file}; check the path"
        )
    return held
