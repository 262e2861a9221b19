"""Shards: the same bytes whatever the workers, whole or not there, each image once."""

import csv
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file
from small_runs import contents, small_network, write, write_photos

from backbone.extraction import Request, VanishedFolderError, extract, formats, list_images, write_features
from backbone.extraction.folder import OutputFolder
from backbone.extraction.formats import ShardFormat

COUNT = 18
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data") / "photos", COUNT)


@pytest.fixture(scope="module")
def expected(photos: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The maps of each photo, computed alone."""
    images = [Path(image.path) for image in list_images([photos])]
    results = extract(images, small_network(), pool="none", batch=1, workers=0)
    return {images[each.number].name: each.features for each in results if each.features is not None}


def index_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def stored(out: Path, format: str, pool: str) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """What the files hold of each photo, found by the index alone."""
    for line in index_of(out):
        if line["status"] != "ok":
            continue
        shard, key = out / line["shard"], line["key"]
        if format == "webdataset":
            with tarfile.open(shard) as tar:
                member = tar.extractfile(f"{key}.safetensors")
                assert member is not None
                yield line["image"], load(member.read())
        elif format == "parquet":
            table = pytest.importorskip("pyarrow.parquet").read_table(shard)
            row = table.slice(int(key), 1).to_pylist()[0]
            assert row["image"] == line["image"]
            yield line["image"], {level: torch.tensor(row[level]) for level in ("c2", "c3")}
        else:
            tensors = load_file(shard)
            if pool == "none":
                yield line["image"], {level: tensors[f"{key}/{level}"] for level in ("c2", "c3")}
            else:
                yield line["image"], {level: tensors[level][int(key)] for level in ("c2", "c3")}


KINDS = [("shards", "none"), ("shards", "avg"), ("shards", "gem"), ("webdataset", "none"), ("webdataset", "avg")]


@pytest.mark.parametrize(("format", "pool"), [*KINDS, ("parquet", "avg")])
def test_the_index_leads_to_the_features_of_each_photo(
    photos: Path, tmp_path: Path, expected: dict[str, dict[str, torch.Tensor]], format: str, pool: str
) -> None:
    if format == "parquet":
        pytest.importorskip("pyarrow")
    failed = write(photos, tmp_path, format=ShardFormat(format), pool=pool)
    lines = index_of(tmp_path)
    assert [line["image"] for line in lines] == [image.name for image in list_images([photos])]
    assert failed == COUNT - len(expected) == sum(line["status"] == "failed" for line in lines) > 0
    found = dict(stored(tmp_path, format, pool))
    assert found.keys() == expected.keys()
    for name, maps in expected.items():
        for level, values in maps.items():
            pooled = {
                "none": values,
                "avg": values.mean((1, 2)),
                "gem": values.double().clamp(min=1e-6).pow(3).mean((1, 2)).pow(1 / 3).float(),
            }[pool]
            torch.testing.assert_close(found[name][level], pooled, rtol=1e-5, atol=1e-5)


def test_the_library_webdataset_reads_its_shards(photos: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")
    write(photos, tmp_path, format=ShardFormat.WEBDATASET, pool="avg")
    shards = [str(shard) for shard in sorted(tmp_path.glob("*.tar"))]
    assert len(shards) > 1
    decoder = webdataset.handle_extension("safetensors", load)
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # the library leaves its files open
        samples = webdataset.WebDataset(shards, shardshuffle=False).decode(decoder)
        read = {sample["json"]["image"]: sample["safetensors"] for sample in samples}
        del samples
        gc.collect()
    expected = dict(stored(tmp_path, "webdataset", "avg"))
    assert read.keys() == expected.keys()
    for name, features in read.items():
        for level, values in expected[name].items():
            assert torch.equal(features[level], values)


@pytest.mark.parametrize(("format", "pool"), [("shards", "none"), ("shards", "avg"), ("webdataset", "none")])
def test_the_bytes_do_not_depend_on_the_workers(photos: Path, tmp_path: Path, format: str, pool: str) -> None:
    for workers in (0, 1, 2):
        write(photos, tmp_path / str(workers), format=ShardFormat(format), pool=pool, workers=workers)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_the_batch_changes_nothing_to_speak_of(
    photos: Path, tmp_path: Path, expected: dict[str, dict[str, torch.Tensor]], batch: int
) -> None:
    write(photos, tmp_path, batch=batch, images_per_shard=100)
    for name, maps in stored(tmp_path, "shards", "none"):
        for level, values in maps.items():
            assert (values - expected[name][level]).abs().max() <= 1e-5 * values.abs().max()


def test_sizes_in_the_index_are_those_the_network_saw(photos: Path, tmp_path: Path) -> None:
    write(photos, tmp_path, multiple_of=16, shorter_side=60, pool="avg")
    assert {(line["height"], line["width"]) for line in index_of(tmp_path)} == {
        ("64", "80"), ("80", "64"), ("112", "64"), ("", ""),
    }  # fmt: skip


def test_failures_are_listed_with_their_reason(photos: Path, tmp_path: Path) -> None:
    write(photos, tmp_path, pool="avg")
    lines = (tmp_path / "failed.csv").read_text().splitlines()
    assert lines == ["image,reason", *[f"{n:03d}.jpg,no kind of image is known to begin like this" for n in (5, 12)]]


def test_a_shard_says_what_its_features_are(photos: Path, tmp_path: Path) -> None:
    write(photos, tmp_path, pool="gem", dtype="bfloat16", about={"network": "resnet18"})
    with safe_open(tmp_path / "shard-000000.safetensors", "pt") as file:
        told = file.metadata()
    assert (told["network"], told["pool"], told["computed_in"]) == ("resnet18", "gem", "bfloat16")
    assert json.loads(told["strides"]) == {"c2": 4, "c3": 8}


@pytest.mark.parametrize(
    ("store", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_the_stored_dtype_is_that_asked_for(photos: Path, tmp_path: Path, store: str, dtype: torch.dtype) -> None:
    for pool in ("none", "avg"):
        write(photos, tmp_path / pool, pool=pool, store=store)
        assert {each.dtype for each in load_file(tmp_path / pool / "shard-000000.safetensors").values()} == {dtype}


def test_a_finished_extraction_is_not_computed_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(photos, tmp_path, pool="avg")
    before = contents(tmp_path)
    monkeypatch.setattr(
        "backbone.extraction.job.read_all", lambda tasks, *_: iter([pytest.fail(str(task)) for task in tasks])
    )
    counts: list[int] = []
    assert write(photos, tmp_path, pool="avg", progress=counts.append) == 2
    assert contents(tmp_path) == before
    assert counts == [COUNT]


@pytest.mark.parametrize("missing", ["shard-000001.csv", "shard-000001.*"])
def test_a_shard_without_its_part_of_the_index_is_written_again(photos: Path, tmp_path: Path, missing: str) -> None:
    write(photos, tmp_path, pool="avg")
    before = contents(tmp_path)
    for path in tmp_path.glob(missing):
        path.unlink()
    (tmp_path / ".shard-000001.safetensors.123.part").write_bytes(b"of a process that was killed")
    write(photos, tmp_path, pool="avg")
    assert contents(tmp_path) == before


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"pool": "gem"}, 'pool "avg" there and "gem" here'),
    ({"pool": "avg", "dtype": "bfloat16"}, 'dtype "float32" there and "bfloat16" here'),
    ({"pool": "avg", "images_per_shard": 5}, "images_per_shard 4 there and 5 here"),
    ({"pool": "avg", "shorter_side": 32}, "shorter_side null there and 32 here"),
    ({"pool": "avg", "format": ShardFormat.WEBDATASET}, 'format "shards" there and "webdataset" here'),
]


@pytest.mark.parametrize(("change", "told"), CHANGES)
def test_other_settings_are_refused_in_one_line(
    photos: Path, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    write(photos, tmp_path, pool="avg")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds another extraction") as error:
        write(photos, tmp_path, **change)
    assert told in str(error.value)
    assert "--overwrite" in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_another_list_is_refused(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", 6)
    write(photos, tmp_path / "out", pool="avg")
    (photos / "000.jpg").rename(photos / "renamed.jpg")
    with pytest.raises(ValueError, match=r"list .* there and .* here"):
        write(photos, tmp_path / "out", pool="avg")


def test_overwriting_replaces_all_that_was_there_and_nothing_else(photos: Path, tmp_path: Path) -> None:
    write(photos, tmp_path / "fresh", pool="avg", format=ShardFormat.WEBDATASET, images_per_shard=10)
    write(photos, tmp_path / "out", pool="avg")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    write(photos, tmp_path / "out", pool="avg", format=ShardFormat.WEBDATASET, images_per_shard=10, overwrite=True)
    found = contents(tmp_path / "out")
    assert found.pop("notes.txt") == b"mine"
    assert found == contents(tmp_path / "fresh")


def test_two_processes_do_not_write_one_folder(photos: Path, tmp_path: Path) -> None:
    with OutputFolder(tmp_path, ShardFormat.SHARDS, 4).lock(), pytest.raises(ValueError, match="one process"):
        write(photos, tmp_path, pool="avg")


def test_a_network_that_overflows_says_so(photos: Path, tmp_path: Path) -> None:
    model = small_network()
    with torch.no_grad():
        model.get_parameter("layer2.1.bn2.weight").fill_(1e9)
    request = Request(pool="avg", store="float16")
    failed = write_features(list_images([photos]), model, tmp_path, request, workers=0)
    assert failed == COUNT
    told = (tmp_path / "failed.csv").read_text()
    assert "its features are not finite, computed in float32 and stored in float16" in told


def test_a_full_disk_is_one_error_and_spoils_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(photos, tmp_path / "whole", pool="avg")
    real = formats.open_shard

    class Full:
        def __init__(self, *_: object) -> None:
            pass

        def add(self, item: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        "backbone.extraction.job.open_shard", lambda file, *rest: Full() if "000002" in file.name else real(file, *rest)
    )
    with pytest.raises(OSError, match=r"shard-000002.safetensors: cannot be written \(no space left on device\)"):
        write(photos, tmp_path / "out", pool="avg")
    left = contents(tmp_path / "out")
    whole = contents(tmp_path / "whole")
    assert {"shard-000000.csv", "shard-000001.csv"} <= left.keys() <= whole.keys()
    assert all(whole[name] == left[name] for name in left)
    monkeypatch.undo()
    write(photos, tmp_path / "out", pool="avg")
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("emptied", [True, False])
def test_a_vanished_folder_is_one_error_and_spoils_nothing(tmp_path: Path, emptied: bool, workers: int) -> None:
    photos = write_photos(tmp_path / "in", 30)
    write(photos, tmp_path / "whole", pool="avg")
    gone = tmp_path / "gone"

    def vanish(_count: int) -> None:
        if not gone.exists() and (tmp_path / "out" / "shard-000000.csv").exists():
            photos.rename(gone)
            if emptied:  # as a mount does
                photos.mkdir()

    with pytest.raises(VanishedFolderError, match="in: the folder of the images must stay"):
        write(photos, tmp_path / "out", pool="avg", workers=workers, progress=vanish)
    whole = contents(tmp_path / "whole")
    assert all(whole[name] == data for name, data in contents(tmp_path / "out").items())
    if emptied:
        photos.rmdir()
    gone.rename(photos)
    write(photos, tmp_path / "out", pool="avg")
    assert contents(tmp_path / "out") == whole


def start(photos: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    code = "import sys; from pathlib import Path; from small_runs import write; "
    code += "write(Path(sys.argv[1]), Path(sys.argv[2]), pool='avg', workers=int(sys.argv[3]))"
    environment = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, str(photos), str(out), str(workers)], env=environment)


def test_killed_at_any_point_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", 120)
    write(photos, tmp_path / "whole", pool="avg")
    out, random, kills = tmp_path / "out", np.random.default_rng(0), 0
    for turn in range(20):
        seen = len(list(out.glob("shard-*.csv"))) if out.exists() else 0
        process = start(photos, out, workers=turn % 3)
        while kills < 4 and process.poll() is None:
            if len(list(out.glob("shard-*.csv"))) > seen:
                time.sleep(float(random.uniform(0, 0.3)))
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        if process.wait() == 0:
            break
    assert kills >= 2
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("pool", ["avg", "none"])
def test_memory_does_not_grow_with_the_number_of_photos(tmp_path: Path, pool: str) -> None:
    photos = write_photos(tmp_path / "in", 4, [(32, 32)])
    for number in range(2000):
        (photos / f"link{number:04d}.jpg").symlink_to(photos / "000.jpg")
    done, held = 0, []

    def told(count: int) -> None:
        nonlocal done
        done += count
        held.append((done, 4096 * int(Path("/proc/self/statm").read_text().split()[1])))

    write(photos, tmp_path / "out", pool=pool, batch=20, images_per_shard=100, workers=1, progress=told)
    early = next(bytes_held for count, bytes_held in held if count > 500)
    assert held[-1][0] == 2004
    assert held[-1][1] - early < 2**24
