"""The same job on Ray Data: the same bytes, also when one of two workers is killed in the middle."""

import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import contents, small_network, write, write_photos

from backbone.extraction import FeatureExtractor

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data") / "photos", 60)


def descendants(pid: int) -> Iterator[int]:
    """The processes that ``pid`` started, and those that they did."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for child in map(int, children.read_text().split() if children.exists() else []):
        yield child
        yield from descendants(child)


def actors() -> list[int]:
    """The processes of our actors on the cluster of this process."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            if b"MapWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:  # it ended
            continue
    return found


def test_the_bytes_are_those_of_one_machine(cluster: None, photos: Path, tmp_path: Path) -> None:
    from backbone.extraction.ray_engine import RayEngine

    write(photos, tmp_path / "here", pool="avg")
    assert write(photos, tmp_path / "there", pool="avg", engine=RayEngine(actors=2)) == 8
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_killed_worker_changes_nothing(cluster: None, photos: Path, tmp_path: Path) -> None:
    from backbone.extraction.ray_engine import RayEngine

    killed: list[int] = []

    def kill(count: int) -> None:
        if count and not killed and (running := actors()):
            os.kill(running[0], signal.SIGKILL)
            killed.append(running[0])

    write(photos, tmp_path / "here", pool="avg", images_per_shard=1)
    write(photos, tmp_path / "there", pool="avg", images_per_shard=1, engine=RayEngine(actors=2), progress=kill)
    assert killed
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_it_goes_on_where_another_engine_stopped(cluster: None, photos: Path, tmp_path: Path) -> None:
    from backbone.extraction.ray_engine import RayEngine

    write(photos, tmp_path, pool="avg")
    before = contents(tmp_path)
    for path in [*tmp_path.glob("shard-00000[1-4]*"), tmp_path / "index.csv"]:
        path.unlink()
    kept = (tmp_path / "shard-000000.safetensors").stat().st_mtime_ns
    time.sleep(0.01)
    write(photos, tmp_path, pool="avg", engine=RayEngine(actors=1))
    assert contents(tmp_path) == before
    assert (tmp_path / "shard-000000.safetensors").stat().st_mtime_ns == kept


def test_the_callable_class_adds_vectors_to_a_pipeline(cluster: None, photos: Path) -> None:
    model = small_network()
    rows = (
        ray.data.read_binary_files(str(photos), include_paths=True)
        .map_batches(
            FeatureExtractor,
            fn_constructor_args=(model,),
            fn_constructor_kwargs={"column": "bytes", "levels": ["c3"]},
            batch_size=16,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .take_all()
    )
    expected = FeatureExtractor(model, levels=["c3"])({"image": np.array([row["bytes"] for row in rows], dtype=object)})
    assert len(rows) == 60
    for row, vector, note in zip(rows, expected["c3"], expected["note"], strict=True):
        assert row["note"] == note
        torch.testing.assert_close(torch.tensor(row["c3"]), torch.from_numpy(vector), equal_nan=True)
