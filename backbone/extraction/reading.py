"""Images read by worker processes, in the order of the list; one that is damaged or hostile costs itself alone."""

import errno
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from backbone.extraction.pixels import fit_image
from backbone.extraction.request import Request
from backbone.extraction.sources import Source, file_system_of, is_address
from backbone.images import UnreadableImageError, read_with_notes

MAX_DECODED_PIXELS: Final = 2**26
"""Pixels of a file that are decoded at all: some 700 MB while it is turned upright and to RGB."""
MAX_FILE_BYTES: Final = 2**28
SECONDS: Final = 8
"""Processor time that decoding one image may take."""
STUCK_SECONDS: Final = 9
"""Processor time after which a process ends that is stuck within a library and does not hear of the limit."""
MEMORY_BYTES: Final = 2**30
"""Memory that a worker process may take beside what it starts with."""
PREFETCHED: Final = 4
"""Images that each worker process reads ahead."""
_GONE: Final = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV)

Task = tuple[int, Source]
"""The number of an image in its list, and where it is."""


class VanishedFolderError(OSError):
    """The folder of the images is no longer there, so that nothing can be said of the images."""


class Read(NamedTuple):
    """One image that was read, or why it was not.

    Attributes:
        number: Its place in the list.
        pixels: (H, W, 3) of uint8 in RGB, in the size that was asked for; None if it could not be read.
        note: Why not; or what had to be guessed to read it.
        gone: The folder that is no longer there, where that is why.
    """

    number: int
    pixels: Tensor | None
    note: str = ""
    gone: str = ""


def read_all(tasks: Iterable[Task], request: Request, workers: int) -> Iterator[Read]:
    """Yield what is read, in the order of ``tasks``, which are asked for little ahead.

    A process that an image ends, by a fault in a library or for want of memory, is replaced: the images that were in
    work are read again one by one, and the one that ends its process once more is the one that failed.

    Args:
        tasks: Numbers and images.
        request: The size of images.
        workers: Processes; 0 reads in this one, where nothing limits the memory that an image takes.

    Raises:
        VanishedFolderError: (an OSError) If a folder of images is no longer there.
    """
    tasks = iter(tasks)
    while True:
        sent: deque[Task] = deque()
        try:
            for read in _load(_remembered(tasks, sent), request, workers):
                sent.popleft()
                yield _with_folder(read)
        except RuntimeError as error:  # what a DataLoader makes of a process that ended
            if not sent or "DataLoader" not in str(error):
                raise
        else:
            return
        for task in sent:  # what was in work
            yield _with_folder(_read_alone(task, request))


def _remembered(tasks: Iterator[Task], sent: deque[Task]) -> Iterator[Task]:
    for task in tasks:
        sent.append(task)
        yield task


def _read_alone(task: Task, request: Request) -> Read:
    try:
        return next(_load([task], request, 1))
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        return Read(task[0], None, "ended the process that decoded it, by a fault or for want of time or memory")


def _load(tasks: Iterable[Task], request: Request, workers: int) -> Iterator[Read]:
    loader: DataLoader[Read] = DataLoader(
        _Reader(request),
        batch_size=None,
        sampler=cast("Sampler[int]", tasks),
        num_workers=workers,
        prefetch_factor=PREFETCHED if workers else None,
        collate_fn=_unchanged,
        worker_init_fn=_limit_process if workers else None,
    )
    reads = iter(loader)  # sets torch's handler, in the first loader of a process
    with _quiet_deaths() if workers else nullcontext():
        for read in reads:  # a copy: shared memory holds a file open as long as it lives
            yield read if read.pixels is None or not workers else read._replace(pixels=read.pixels.clone())


def _with_folder(read: Read) -> Read:
    if read.gone:
        raise VanishedFolderError(
            f"{read.gone}: the folder of the images must stay until the end, and is gone or empty; bring it back and "
            f"start again: what is written stays valid"
        )
    return read


def _unchanged(read: Any) -> Any:  # noqa: ANN401 - torch would take it apart
    return read


@contextmanager
def _quiet_deaths() -> Iterator[None]:
    """Let the death of a process be found where its result is awaited, and not by a signal in the midst of a network.

    torch's handler of SIGCHLD would raise wherever the main thread happens to be.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _limit_process(_number: int) -> None:
    """Limit the memory of a worker process, where the system can."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    except (ImportError, OSError, ValueError):  # not Linux
        return


class _Reader(Dataset[Read]):
    """Reads one image at a time; runs in the worker processes."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def __getitem__(self, task: Any) -> Read:  # noqa: ANN401 - a Task; torch says int
        number, source = task
        try:
            content = _content_of(source)
            with _limited_time():
                image, notes = _decoded(content, source)
                pixels = np.array(fit_image(image, self.request))
        except UnreadableImageError as error:
            return Read(number, None, error.reason)
        except MemoryError:
            return Read(number, None, f"needs more than {MEMORY_BYTES // 2**20:,} MiB of memory to be decoded")
        except OSError as error:
            return Read(number, None, _words_of(error), gone=_vanished_folder(source, error))
        except Exception as error:  # a library's own, for bytes that nobody foresaw
            return Read(number, None, _words_of(error))
        return Read(number, torch.from_numpy(pixels), "; ".join(notes))


def _content_of(source: Source) -> bytes | Image.Image:
    """Return an image in memory, or a file's bytes; a disk may take its time, outside of all limits."""
    if isinstance(source, Image.Image | bytes):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:  # noqa: PLR2004
            raise ValueError(f"an array must be (H, W, 3) of uint8, got {source.dtype} {source.shape}")
        return Image.fromarray(source)
    return _bytes_of(os.fspath(source))


def _decoded(content: bytes | Image.Image, source: Source) -> tuple[Image.Image, list[str]]:
    if isinstance(content, Image.Image):
        return content.convert("RGB"), []
    name = "bytes" if isinstance(source, bytes) else str(source)
    return read_with_notes(Path(name), data=content, max_pixels=MAX_DECODED_PIXELS)


def _bytes_of(path: str) -> bytes:
    """Return what the file holds."""
    if is_address(path):
        system, within = file_system_of(path)
        with system.open(within, "rb") as file:
            data: bytes = file.read(MAX_FILE_BYTES + 1)
    else:
        if not os.path.isfile(path) and os.path.exists(path):
            raise ValueError("is no file")  # reading a pipe would wait for ever
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"has more than {MAX_FILE_BYTES:,} bytes")
    return data


@contextmanager
def _limited_time() -> Iterator[None]:
    """Raise after ``SECONDS`` of processor time; end a worker process that is stuck in a library's own code."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGPROF"):
        yield
        return
    before = signal.signal(signal.SIGPROF, _give_up)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    if torch.utils.data.get_worker_info() is not None:
        signal.setitimer(signal.ITIMER_VIRTUAL, STUCK_SECONDS)  # whose signal, unheard, ends a process
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _give_up(_signal: int, _frame: object) -> None:
    error = UnreadableImageError(f"takes more than {SECONDS} s to be decoded")
    error.reason = str(error)
    raise error


def _words_of(error: Exception) -> str:
    words = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(words.split()) or type(error).__name__


def _vanished_folder(source: Source, error: OSError) -> str:
    """Return the folder of an image that cannot be opened, where the folder itself is gone or empty; else nothing."""
    if not isinstance(source, str | os.PathLike):
        return ""
    if not isinstance(error, FileNotFoundError | NotADirectoryError) and error.errno not in _GONE:
        return ""
    path = os.fspath(source)
    folder = path.rpartition("/")[0] if is_address(path) else os.path.dirname(path)
    return folder if _is_empty(folder) else ""


def _is_empty(folder: str) -> bool:
    try:
        if is_address(folder):
            system, within = file_system_of(folder)
            return not system.ls(within, detail=False)
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True
