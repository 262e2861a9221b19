"""The same job on Ray Data: a row is a shard, and an actor computes and writes it.

Ray schedules: which machine takes which shard, how many wait, and what is done again after a machine is lost. A shard
is the same wherever it is computed, and is put in its place whole, so that doing one twice does no harm.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Final

from backbone.extraction.folder import Shard
from backbone.extraction.job import Job, Progress, write_shards
from backbone.extraction.network import Network
from backbone.extraction.sources import Named
from backbone.features import Backbone

_PROCESSORS_PER_ACTOR: Final = 1


class RayEngine:
    """Computes the shards of ``write_features`` on a Ray cluster.

    The folder of the results must be one that all machines see. The images may be addresses that fsspec knows.

    Args:
        address: Of the cluster; ``auto`` finds the one this machine belongs to, None starts one here.
        actors: Networks at once; by default one for each GPU of the cluster, or one where there is none.
        device: ``cpu`` or ``cuda``; by default the latter where the cluster has a GPU.

    Raises:
        ModuleNotFoundError: If Ray is not installed.
    """

    def __init__(self, address: str | None = None, actors: int | None = None, device: str | None = None) -> None:
        if find_spec("ray") is None:
            raise ModuleNotFoundError(
                "--engine ray needs Ray, which is not installed: pip install 'backbone[ray]'; where Ray has no wheel "
                "for this Python, take --engine local",
                name="ray",
            )
        self.address, self.actors, self._device, self.started = address, actors, device, False

    @property
    def device(self) -> str:
        """Where it computes, ``cpu`` or ``cuda``; asks the cluster."""
        return self._device or ("cuda" if self._gpus() else "cpu")

    def __call__(self, job: Job, model: Backbone, shards: Sequence[Shard], progress: Progress) -> None:
        """Write all of ``shards``.

        Raises:
            OSError: If a shard failed for good; those that are whole stay so.
        """
        ray = self._connected()
        stored = ray.put(model)  # held here as long as an actor may start again
        try:
            for row in self._written(ray, job, stored, shards).iter_rows():
                progress(int(row["images"]))
        except ray.exceptions.RayError as error:
            raise OSError(f"Ray gave up: {_words_of(error)}") from None
        finally:
            if self.started:
                ray.shutdown()

    def _written(self, ray: Any, job: Job, model: Any, shards: Sequence[Shard]) -> Any:  # noqa: ANN401
        """Return the pipeline: rows of shards -> how many images each holds."""
        rows = [
            {"number": shard.number, "start": shard.start, "names": [image.name for image in shard.images],
             "paths": [image.path for image in shard.images]}
            for shard in shards
        ]  # fmt: skip
        largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes())
        return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            ShardWorker,
            fn_constructor_kwargs={"job": job, "model": model},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=self.actors or max(1, self._gpus())),
            num_cpus=min(_PROCESSORS_PER_ACTOR + job.workers, largest),  # no machine could take more
            num_gpus=1 if job.device == "cuda" else 0,
        )

    def _gpus(self) -> int:
        return int(self._connected().cluster_resources().get("GPU", 0))

    def _connected(self) -> Any:  # noqa: ANN401
        """Return Ray, with a cluster."""
        import ray
        import ray.data

        if not ray.is_initialized():
            local = {} if self.address else {"include_dashboard": False}
            ray.init(address=self.address, log_to_driver=False, configure_logging=False, **local)
            ray.data.DataContext.get_current().enable_progress_bars = False  # there is one already
            self.started = True
        return ray


def _words_of(error: BaseException) -> str:
    """Return what went wrong in a worker, in one line: the first error of the tracebacks that Ray hands on as text."""
    first = re.search(r"^(?!ray\.)[\w.]*(?:Error|Exception): (.+)$", str(error), re.MULTILINE)
    return " ".join((first[1] if first else str(error)).split()) or type(error).__name__


class ShardWorker:
    """An actor: loads the network once and writes shards.

    Args:
        job: What and where to.
        model: The backbone, or a reference to it in Ray's store.
    """

    def __init__(self, job: Job, model: Any) -> None:  # noqa: ANN401
        import ray

        backbone = ray.get(model) if isinstance(model, ray.ObjectRef) else model
        self.job, self.network = job, Network(backbone, job.request, job.device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """Write the shards of a batch of rows; return how many images each holds."""
        counts = []
        for number, start, names, paths in zip(
            *(batch[key] for key in ("number", "start", "names", "paths")), strict=True
        ):
            images = [Named(str(name), str(path)) for name, path in zip(names, paths, strict=True)]
            write_shards(self.job, self.network, [Shard(int(number), int(start), images)], _silent)
            counts.append(len(images))
        return {"images": counts}


def _silent(_count: int) -> None:
    pass
