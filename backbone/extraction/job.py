"""A list of images as shards in a folder: killed at any point, the same call goes on."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, Self

import torch

from backbone.extraction.folder import INDEX, Entry, OutputFolder, Shard, fingerprint
from backbone.extraction.formats import Item, ShardFormat, ShardWriter, draft_of, open_shard, require_format
from backbone.extraction.network import Network
from backbone.extraction.reading import read_all
from backbone.extraction.request import Request
from backbone.extraction.sources import Named
from backbone.extraction.stream import Extracted, computed
from backbone.features import Backbone
from backbone.weights.writing import put_in_place

IMAGES_PER_SHARD: Final = {True: 1024, False: 64}
"""By whether features are pooled: some 15 MB of vectors or 1 GB of maps, of a ResNet-50."""
_VERSION: Final = 1
_WAITING_BATCHES: Final = 2

Progress = Callable[[int], None]
"""Told how many more images are done."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is computed and where it goes; can be sent to other processes.

    Attributes:
        folder: Where to.
        request: What to compute.
        metadata: What each shard says of its features.
        workers: Processes that read, beside the one that computes.
        device: Where to compute, ``cpu`` or ``cuda``.
    """

    folder: OutputFolder
    request: Request
    metadata: Mapping[str, str]
    workers: int
    device: str


class Engine(Protocol):
    """Computes shards elsewhere than in this process."""

    @property
    def device(self) -> str:
        """Where it computes, ``cpu`` or ``cuda``."""

    def __call__(self, job: Job, model: Backbone, shards: Sequence[Shard], progress: Progress) -> None:
        """Write all of ``shards``."""


def write_features(
    images: Sequence[Named],
    model: Backbone,
    out: Path,
    request: Request,
    *,
    format: ShardFormat = ShardFormat.SHARDS,
    images_per_shard: int | None = None,
    workers: int = 1,
    device: torch.device | None = None,
    overwrite: bool = False,
    about: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> int:
    """Write the features of all images as shards, and an index of them; return how many images failed.

    Shards that the folder has already, from a call with the same list and settings, are not computed again.

    Args:
        images: The list.
        model: The backbone.
        out: The folder; made if need be.
        request: What to compute.
        format: Of the shards.
        images_per_shard: By default 1024 with pooling, 64 without.
        workers: Processes that read; the result does not depend on it.
        device: Where to compute; by default where the model is.
        overwrite: Replace the extraction that the folder holds.
        about: What else to say of the features in each shard.
        progress: Told how many more images are done, those of an earlier call at once.
        engine: What computes, in place of this process.

    Raises:
        ValueError: If the folder holds another extraction, another process writes it, or a setting cannot be honoured.
        OSError: If nothing can be written, or the folder of the images vanishes; shards that are whole stay so.
    """
    require_format(format, request)
    network = Network(model, request, device if engine is None else "cpu")
    kind = network.device.type if engine is None else engine.device
    if images_per_shard is None:
        images_per_shard = IMAGES_PER_SHARD[request.pool != "none"]
    folder = OutputFolder(out if engine is None else out.absolute(), format, images_per_shard)
    told = progress or _silent
    facts = {**(about or {}), **_facts(network)}
    lock = folder.lock()
    try:
        folder.begin({**_identity(images, model, network, folder), "device": kind, **facts}, overwrite=overwrite)
        missing = folder.missing(images)
        told(len(images) - sum(len(shard.images) for shard in missing))
        job = Job(folder, request, facts, workers, kind)
        if engine is None:
            write_shards(job, network, missing, told)
        elif missing:
            engine(job, model, missing, told)
        with _named_errors(out / INDEX):
            return folder.finish(images)
    finally:
        lock.release()


def write_shards(job: Job, network: Network, shards: Sequence[Shard], progress: Progress) -> None:
    """Compute and write shards one after the other, reading ahead beyond their ends.

    Each is a function of its images alone: batches do not reach over its end, and the network starts anew.

    Raises:
        OSError: As ``write_features``.
    """
    tasks = ((shard.start + place, image.path) for shard in shards for place, image in enumerate(shard.images))
    reads = read_all(tasks, job.request, job.workers)
    drafts: deque[_OpenShard] = deque(maxlen=_WAITING_BATCHES + 2)  # earlier ones are in their place

    def clean() -> None:
        for each in drafts:
            each.abandon()

    with _Background(clean) as background:
        for shard in shards:
            network.start_anew()
            written = _OpenShard(job, network, shard)
            drafts.append(written)
            for results in computed(islice(reads, len(shard.images)), network):
                background.run(written.add, results)
                progress(len(results))
            background.run(written.commit)


class _OpenShard:
    """A shard that is being written; its methods run in the thread that writes."""

    def __init__(self, job: Job, network: Network, shard: Shard) -> None:
        self.job, self.network, self.shard = job, network, shard
        self.path = job.folder.shard(shard.number)
        self.draft = draft_of(self.path)
        self.file: BinaryIO | None = None
        self.results: dict[int, Extracted] = {}

    def add(self, results: Sequence[Extracted]) -> None:
        """Write the features of a batch."""
        with _named_errors(self.path):
            for result in results:
                self.results[result.number] = self._written(result)

    def commit(self) -> None:
        """Put the shard in its place, and then its part of the index."""
        with _named_errors(self.path):
            keys = self._writer().finish()
            assert self.file is not None
            self.file.close()
            put_in_place(self.draft, self.path)
            start, images = self.shard.start, self.shard.images
            entries = [self._entry(start + place, image.name, keys) for place, image in enumerate(images)]
            self.job.folder.commit(self.shard.number, entries)

    def abandon(self) -> None:
        """Leave nothing of a shard that is not whole."""
        with suppress(OSError):  # the disk that is full once more
            if self.file is not None:
                self.file.close()
        self.draft.unlink(missing_ok=True)

    def _writer(self) -> ShardWriter:
        if self.file is None:
            job = self.job
            self.file = self.draft.open("wb")
            names = [image.name for image in self.shard.images]
            self.writer = open_shard(self.file, job.folder.format, job.request, self.network.specs, job.metadata, names)
        return self.writer

    def _written(self, result: Extracted) -> Extracted:
        """Write one image's features, and return the result without them."""
        if result.features is None or result.size is None:
            return result
        features = {level: values.cpu() for level, values in result.features.items()}
        if not all(values.sum(dtype=torch.float32).isfinite() for values in features.values()):
            computed_in, stored_in = self.job.request.dtype, self.job.request.stored_dtype
            note = f"its features are not finite, computed in {computed_in} and stored in {stored_in}"
            return replace(result, features=None, note=note)
        name = self.shard.images[result.number - self.shard.start].name
        self._writer().add(Item(result.number, name, result.size, features))
        return replace(result, features={})

    def _entry(self, number: int, name: str, keys: Mapping[int, str]) -> Entry:
        result = self.results[number]
        height, width = ("", "") if result.size is None else map(str, result.size)
        if result.features is None:
            return Entry(name, "failed", height, width, "", "", result.note)
        return Entry(name, "ok", height, width, self.path.name, keys[number], result.note)


class _Background:
    """One thread that does things in turn, few of them waiting; after an error it does no more and raises it.

    Args:
        cleanup: Called at the end, whatever happened.
    """

    def __init__(self, cleanup: Callable[[], None]) -> None:
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self.waiting: deque[Future[None]] = deque()
        self.cleanup, self.failed = cleanup, False

    def run(self, function: Callable[..., None], *arguments: object) -> None:
        """Do this later; raises what an earlier one raised."""
        self.waiting.append(self.executor.submit(self._unless_failed, function, *arguments))
        while len(self.waiting) > _WAITING_BATCHES:
            self.waiting.popleft().result()

    def _unless_failed(self, function: Callable[..., None], *arguments: object) -> None:
        if self.failed:
            return
        try:
            function(*arguments)
        except BaseException:
            self.failed = True
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self.waiting:
                self.waiting.popleft().result()
        finally:
            self.executor.shutdown()
            self.cleanup()


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Name the file that cannot be written, and the remedy."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path}: cannot be written ({(error.strerror or str(error)).lower()}); make room and start again: the "
            f"shards that are whole are kept"
        ) from None


def _identity(images: Sequence[Named], model: Backbone, network: Network, folder: OutputFolder) -> dict[str, Any]:
    """Return what decides the bytes of an extraction."""
    return {
        "version": _VERSION,
        "number_of_images": len(images),
        "list": fingerprint(images),
        "model": _fingerprint_of(model),
        **network.request.model_dump(mode="json"),
        "format": str(folder.format),
        "images_per_shard": folder.images_per_shard,
    }


def _fingerprint_of(model: Backbone) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _facts(network: Network) -> dict[str, str]:
    """Return what each shard says of its features."""
    return {
        "pool": network.request.pool,
        "computed_in": network.request.dtype,
        "strides": json.dumps({level: spec.stride for level, spec in network.specs.items()}),
        "preprocessing": json.dumps(asdict(network.preprocessing)),
    }


def _silent(_count: int) -> None:
    pass
