"""Where weights come from: addresses are verified, resumed and cached; what cannot be had is one clear error."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import foreign
import pytest
import timm
import torch
from conftest import build

from backbone import convert_weights, load_weights
from backbone.features import Preprocessing
from backbone.weights import sources

ROOT = Path(__file__).parents[2]


class Server(ThreadingHTTPServer):
    """Says nothing of clients that were killed."""

    def handle_error(self, *_: object) -> None: ...


class Site(BaseHTTPRequestHandler):
    """Serves one file, with ranges; ends early, or refuses ranges, when told to."""

    content: ClassVar[bytes] = b""
    ends_after: ClassVar[int | None] = None
    knows_ranges: ClassVar[bool] = True
    requests: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.requests.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.knows_ranges else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start : self.ends_after])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Serve a ResNet-18 at ``site.url``; ``site.address`` has its hash."""
    torch.save(foreign.torchvision_network().state_dict(), tmp_path / "resnet18.pth")
    content = (tmp_path / "resnet18.pth").read_bytes()
    handler = type("ThisSite", (Site,), {"content": content, "requests": []})
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/resnet18.pth"
    digest = hashlib.sha256(content).hexdigest()
    yield SimpleNamespace(url=url, handler=handler, digest=digest, address=f"{url}#sha256={digest}")
    server.shutdown()
    server.server_close()
    thread.join()


def cached_files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_address_is_downloaded_verified_and_loaded(site: SimpleNamespace, cache: Path) -> None:
    model = build()
    load_weights(model, site.address, name="resnet18")
    assert cached_files(cache) == [f"{site.digest[:16]}-resnet18.pth"]
    assert sources.download(site.address).read_bytes() == site.handler.content


def test_cached_file_needs_no_network(site: SimpleNamespace, cache: Path) -> None:
    for _ in range(2):
        sources.download(site.address)
    assert len(site.handler.requests) == 1


def test_damaged_cached_file_is_fetched_again(site: SimpleNamespace, cache: Path) -> None:
    sources.download(site.address).write_bytes(b"damaged")
    assert sources.download(site.address).read_bytes() == site.handler.content


def test_interrupted_download_resumes_where_it_ended(site: SimpleNamespace, cache: Path) -> None:
    site.handler.ends_after = 1_000_000
    with pytest.raises(
        OSError, match=rf"ended after 1000000 of {len(site.handler.content)} bytes; run again to resume"
    ):
        sources.download(site.address)
    site.handler.ends_after = None
    assert sources.download(site.address).read_bytes() == site.handler.content
    assert site.handler.requests == [None, "bytes=1000000-"]


def test_server_without_ranges_is_asked_for_all_again(site: SimpleNamespace, cache: Path) -> None:
    site.handler.ends_after = 1_000_000
    with pytest.raises(OSError, match="ended after"):
        sources.download(site.address)
    site.handler.ends_after, site.handler.knows_ranges = None, False
    assert sources.download(site.address).read_bytes() == site.handler.content


@pytest.mark.parametrize("part", [b"", b"not what the server has", None])
def test_leftover_of_an_earlier_run_never_spoils_a_download(site: SimpleNamespace, cache: Path, part: bytes) -> None:
    cache.mkdir(parents=True)
    (cache / f"{site.digest[:16]}-resnet18.pth.part").write_bytes(part if part is not None else site.handler.content)
    if part:
        with pytest.raises(ValueError, match="nothing was kept"):
            sources.download(site.address)
    assert sources.download(site.address).read_bytes() == site.handler.content


def test_wrong_hash_is_refused_and_nothing_kept(site: SimpleNamespace, cache: Path) -> None:
    with pytest.raises(ValueError, match=f"must have the sha256 {'0' * 64}, got {site.digest}"):
        sources.download(f"{site.url}#sha256={'0' * 64}")
    assert cached_files(cache) == []


@pytest.mark.parametrize("ending", ["", "#sha256=", "#sha256=abc", "#md5=" + "0" * 64])
def test_address_without_a_whole_hash_is_refused(site: SimpleNamespace, ending: str) -> None:
    with pytest.raises(ValueError, match=r"must end in #sha256= and the 64 hex digits"):
        sources.download(site.url + ending)
    assert site.handler.requests == []


def test_file_address_is_verified_too(site: SimpleNamespace, cache: Path, tmp_path: Path) -> None:
    url = (tmp_path / "resnet18.pth").as_uri()
    assert sources.download(f"{url}#sha256={site.digest}").read_bytes() == site.handler.content


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.pth", "file:///nowhere/x.pth"])
def test_address_that_cannot_be_reached_is_named(cache: Path, url: str) -> None:
    with pytest.raises(OSError, match=f"{re.escape(url)}: cannot be downloaded"):
        sources.download(f"{url}#sha256={'0' * 64}")


def test_file_beyond_the_limit_is_refused_before_it_is_fetched(
    site: SimpleNamespace, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match="must be at most 1000 bytes"):
        sources.download(site.address)
    assert cached_files(cache) == []


def test_download_shows_its_progress(site: SimpleNamespace, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sources.download(site.address)
    assert "resnet18.pth" in capfd.readouterr().err


# One process imports torch and forks a child for each dangerous moment, which is killed there.
KILLED = """
import hashlib, json, os, signal
from pathlib import Path
import torch
torch.set_num_threads(1)
import backbone.weights.convert as convert
from backbone.weights import sources, writing

moment, calls = 0, 0
os.fsync = lambda handle: None  # slow, and what a killed process has written stays in the page cache

def killing(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def half(write):  # as if killed in the middle of writing
    def call(draft, *args):
        write(draft, *args)
        os.truncate(draft, draft.stat().st_size // 2)
        killing(lambda: None)()
        write(draft, *args)
    return call

for owner, name in [(os, "fsync"), (Path, "replace"), (Path, "chmod"), (sources, "_sha256"), (sources, "_copy"),
                    (sources.Progress, "update"), (convert, "_write")]:
    setattr(owner, name, killing(getattr(owner, name)))
convert._write = half(convert._write)
sources.CHUNK = 2**23
seen, status = [], 1
WARM_UP
while status:
    moment += 1
    BEFORE
    if not (child := os.fork()):
        JOB
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    seen.append(hashlib.sha256(OUT.read_bytes()).hexdigest() if OUT.exists() else None)
print(json.dumps(seen))
"""


def kill_everywhere(job: str, out: Path, before: str, home: Path, warm_up: str = "pass") -> list[str | None]:
    """Kill ``job`` at its first dangerous moment, then at its second ...; return the hash of ``out`` after each."""
    program = (
        KILLED.replace("JOB", job)
        .replace("OUT", f"Path({str(out)!r})")
        .replace("BEFORE", before)
        .replace("WARM_UP", warm_up)
    )
    environment = {**os.environ, "TORCH_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    seen: list[str | None] = json.loads(done.stdout.splitlines()[-1])
    return seen


@pytest.mark.parametrize("resumed", [True, False])
def test_killed_download_leaves_nothing_or_the_whole_file(
    site: SimpleNamespace, cache: Path, tmp_path: Path, resumed: bool
) -> None:
    cached = cache / f"{site.digest[:16]}-resnet18.pth"
    clean = f"[path.unlink() for path in Path({str(cache)!r}).glob('*')]"
    seen = kill_everywhere(
        f"sources.download({site.address!r})", cached, "pass" if resumed else clean, tmp_path / "home"
    )
    assert set(seen) == {None, site.digest}
    assert seen[-1] == site.digest
    assert len(seen) >= (5 if resumed else 10)
    assert any(request for request in site.handler.requests) == resumed


def test_killed_conversion_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    torch.save(foreign.torchvision_network().state_dict(), tmp_path / "in.pth")
    out = tmp_path / "out.pkl"
    job = f"convert.convert_weights({str(tmp_path / 'in.pth')!r}, Path({str(out)!r}), 'detectron2')"
    before = f"Path({str(out)!r}).write_bytes(b'old')"
    seen = kill_everywhere(job, out, before, tmp_path, warm_up=f"{job}; moment, calls = 0, 0")  # for what it imports
    convert_weights(tmp_path / "in.pth", out, "detectron2")
    old, new = hashlib.sha256(b"old").hexdigest(), hashlib.sha256(out.read_bytes()).hexdigest()
    assert set(seen) == {old, new}
    assert len(seen) >= 6


# Hugging Face and timm through doubles of their download functions: the tests have no network.


def test_hugging_face_address_goes_through_its_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    torch.save(foreign.torchvision_network().state_dict(), tmp_path / "model.bin")

    def download(repository: str, file: str, *, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(tmp_path / "model.bin")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost")  # a name that is known without a network
    load_weights(build(), "hf://microsoft/resnet-18/sub/model.bin", name="resnet18")
    load_weights(build(), "hf://microsoft/resnet-18@main/model.bin", name="resnet18")
    assert asked == [("microsoft/resnet-18", "sub/model.bin", None), ("microsoft/resnet-18", "model.bin", "main")]


def test_absent_huggingface_hub_is_told_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        load_weights(build(), "hf://microsoft/resnet-18/model.safetensors", name="resnet18")


@pytest.mark.parametrize("address", ["hf://", "hf://org", "hf://org/repo", "hf://org/repo/"])
def test_incomplete_hugging_face_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="must be hf://org/repo/file"):
        load_weights(build(), address, name="resnet18")


def test_timm_name_goes_through_timms_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: Any = foreign.timm_network("resnet18")
    theirs.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (4, 5, 6), "interpolation": "bicubic"}
    asked = []

    def create_model(name: str, *, pretrained: bool) -> Any:
        asked.append((name, pretrained))
        return theirs

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost")  # a name that is known without a network
    model = build()
    report = load_weights(model, "timm/resnet18.a1_in1k", name="resnet18")
    assert asked == [("resnet18.a1_in1k", True)]
    assert model.preprocessing == Preprocessing((0.1, 0.2, 0.3), (4, 5, 6), interpolation="bicubic")
    assert report.metadata.known
    assert torch.equal(model.state_dict()["conv1.weight"], theirs.state_dict()["conv1.weight"])


def test_unknown_timm_name_is_told_what_timm_says() -> None:
    with pytest.raises(ValueError, match=r"timm/resnet999: timm gives no such weights: .*resnet999"):
        load_weights(build(), "timm/resnet999", name="resnet18")
