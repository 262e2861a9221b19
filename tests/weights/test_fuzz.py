"""2,000 damaged, dishonest and hostile files: none runs code, hangs, half-loads a model or half-writes a file.

How many of each: truncated 400, bytes flipped 400, wrong shapes 200, NaN or Inf or negative variances 150, missing keys
150, extra keys 150, nested wrappers 150, huge declared sizes 100, pickles with code 300 (10 opcodes that call
something, in each of 3 containers, 10 times).
"""

import copyreg
import io
import os
import pickle
import random
import struct
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import foreign
import pytest
import torch
from conftest import build
from foreign import State
from safetensors.torch import save_file

from backbone import Backbone, convert_weights, load_weights
from backbone.weights.metadata import BGR_255

SECONDS: Final = 5.0
CONTAINERS: Final = (".pth", "old.pth", ".safetensors", ".pkl")
EXTENSION: Final = 201  # a code of copyreg's range for private use is 240 to 255; EXT1 takes any that fits a byte

Mutant = tuple[Path, bool | None]
"""A file, and whether it is still sound; None where either may be: a flipped byte can hit a number or padding."""


class Trap:
    """Makes a folder by whatever an unpickler may call on it."""

    folder = ""

    def __new__(cls, folder: str = "", **_: str) -> "Trap":
        cls.spring(folder)
        return super().__new__(cls)

    @staticmethod
    def spring(folder: object) -> None:
        if folder:
            os.mkdir(str(folder))

    def __setstate__(self, state: str) -> None:
        self.spring(state)

    def append(self, value: str) -> None:
        self.spring(value)

    def __setitem__(self, key: str, value: str) -> None:
        self.spring(value)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def word(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


TRAP: Final = b"c" + __name__.encode() + b"\nTrap\n"
ROUTES: Final[dict[str, Callable[[bytes], bytes]]] = {
    # each makes the folder whose name is pushed by the bytes given
    "REDUCE": lambda folder: b"cos\nmkdir\n(" + folder + b"tR",
    "STACK_GLOBAL": lambda folder: text("os") + text("mkdir") + b"\x93" + folder + b"\x85R",
    "INST": lambda folder: b"(" + folder + b"ios\nmkdir\n",
    "OBJ": lambda folder: b"(" + TRAP + folder + b"o",
    "NEWOBJ": lambda folder: TRAP + folder + b"\x85\x81",
    "NEWOBJ_EX": lambda folder: TRAP + folder + b"\x85}\x92",
    "BUILD": lambda folder: TRAP + b")\x81" + folder + b"b",
    "EXT1": lambda folder: b"\x82" + bytes([EXTENSION]) + folder + b"\x85R",
    "APPEND": lambda folder: TRAP + b")\x81" + folder + b"a",
    "SETITEM": lambda folder: TRAP + b")\x81" + text("key") + folder + b"s",
}


@pytest.fixture(autouse=True)
def _extension() -> Iterator[None]:
    copyreg.add_extension("os", "mkdir", EXTENSION)
    yield
    copyreg.remove_extension("os", "mkdir", EXTENSION)


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_runs_in_an_unsafe_reader(tmp_path: Path, route: str) -> None:
    pickle.loads(b"\x80\x04" + ROUTES[route](text(str(tmp_path / "ran"))) + b".")
    assert (tmp_path / "ran").is_dir()


def small_files(state: State) -> dict[str, State]:
    """Return a ResNet-18 whose convolutions share bytes in a .pth, and the two stages that fit other containers."""
    room = torch.full((512 * 512 * 9,), 0.01, dtype=torch.half)  # the largest convolution's
    flat = {key: room[: value.numel()].view(value.shape) if value.ndim == 4 else value for key, value in state.items()}
    return {"whole": flat, "two stages": {k: v for k, v in state.items() if k.startswith(("conv1", "bn1", "layer1"))}}


class Maker:
    """Makes mutants, seeded, into a folder of its own."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.random = folder, random.Random(0)
        files = small_files(foreign.torchvision_network("resnet18").state_dict())
        self.whole, self.small = files["whole"], files["two stages"]
        self.sound = {container: self.write(self.small, container).read_bytes() for container in CONTAINERS[2:]}
        self.sound |= {container: self.write(self.whole, container).read_bytes() for container in CONTAINERS[:2]}

    def write(self, content: Any, container: str) -> Path:
        path = self.folder / f"mutant{container}"
        if container == ".safetensors":
            save_file({key: value.contiguous() for key, value in content.items()}, path)
        elif container == ".pkl":
            foreign.write_pickle(foreign.caffe2_names(content), path)
        else:
            torch.save(content, path, _use_new_zipfile_serialization=container == ".pth")
        return path

    def raw(self, container: str, content: bytes) -> Path:
        path = self.folder / f"mutant{container}"
        path.write_bytes(content)
        return path

    def truncated(self, number: int) -> Mutant:
        container = CONTAINERS[number % 4]
        sound = self.sound[container]
        return self.raw(container, sound[: self.random.randrange(len(sound))]), False

    def flipped(self, number: int) -> Mutant:
        container = CONTAINERS[number % 4]
        sound = bytearray(self.sound[container])
        limit = len(sound) if number % 8 < 4 else 4000  # half of them where the structure is
        for _ in range(self.random.choice([1, 1, 4, 64])):
            sound[self.random.randrange(limit)] ^= self.random.randrange(1, 256)
        return self.raw(container, bytes(sound)), None

    def reshaped(self, number: int) -> Mutant:
        key = self.random.choice([k for k in self.small if not k.endswith("num_batches_tracked")])
        value = self.small[key]
        shapes = [(), (0,), (*value.shape, 1), value.shape[:-1], (value.shape[0] + 1, *value.shape[1:]), (2**31,)]
        shape = self.random.choice(shapes)
        return self.write({**self.whole, key: torch.zeros(()).expand(shape)}, ".pth"), False

    def not_finite(self, number: int) -> Mutant:
        kind = self.random.choice([torch.nan, torch.inf, -torch.inf, -1.0])
        ending = "running_var" if kind == -1 else ""
        key = self.random.choice([k for k, v in self.small.items() if k.endswith(ending) and v.is_floating_point()])
        value = self.small[key].clone()
        value.view(-1)[self.random.randrange(value.numel())] = kind
        container = self.random.choice([".pth", ".safetensors"])
        return self.write({**(self.whole if container == ".pth" else self.small), key: value}, container), False

    def missing(self, number: int) -> Mutant:
        required = [key for key in self.small if not key.endswith("num_batches_tracked")]
        gone = self.random.sample(required, self.random.randint(1, len(required)))
        return self.write({key: value for key, value in self.small.items() if key not in gone}, ".safetensors"), False

    def extra(self, number: int) -> Mutant:
        word = self.random.choice(
            ["layer1.2", "layer1.0.se", "gate", "stem", "module.conv1", "layer5.0", "bn1.x", "fc2", ""]
        )
        key = f"{word}.{self.random.choice(['weight', 'bias', 'running_mean'])}"
        return self.write({**self.small, key: torch.ones(self.random.randint(0, 5))}, ".safetensors"), False

    def nested(self, number: int) -> Mutant:
        kind = self.random.choice(["known", "unknown", "too deep", "endless", "twice"])
        content: Any = dict(self.whole)
        words = [self.random.choice(["model", "state_dict", "module"]) for _ in range(self.random.randint(1, 6))]
        words = {"unknown": [*words, "mystery"], "too deep": ["model"] * self.random.randint(10, 300)}.get(kind, words)
        if kind == "endless":
            content["model"] = content
        if kind == "twice":
            content = {"model": content, "model.conv1": {"weight": torch.ones(1)}}
        for word in words if kind != "twice" else []:
            content = {word: content, "epoch": 3}
        return self.write(content, ".pth"), kind == "known"

    def huge(self, number: int) -> Mutant:
        size = self.random.choice([10**9, 10**10, 2**40, 2**62, 2**63 - 1])
        match number % 6:
            case 0:  # a NumPy array of more numbers than there are bytes
                array = (
                    b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(K\0tU\x01b\x87R(K\x01("
                    + word(size)
                    + b"t"
                )
                array += b"cnumpy\ndtype\nU\x02f4K\0K\x01\x87R(K\x03U\x01<NNNK\0K\0K\0tb\x89U\x04abcdtb"
                return self.raw(".pkl", b"\x80\x02}" + text("conv1_w") + array + b"s."), False
            case 1:  # bytes that are not there
                return self.raw(
                    ".pkl", b"\x80\x04}" + text("conv1_w") + b"\x8e" + struct.pack("<Q", size) + b"abcs."
                ), False
            case 2:  # a memo of that length
                put = b"r" + struct.pack("<I", min(size, 2**32 - 1))
                return self.raw(".pkl", b"\x80\x02}" + put + text("a") + b"K\x01s."), False
            case 3:  # a header of that length
                sound = self.sound[".safetensors"]
                return self.raw(".safetensors", struct.pack("<Q", size) + sound[8:]), False
            case 4:
                sound = self.sound[".safetensors"].replace(b"[64,3,7,7]", f"[{size},3,7,7]".encode(), 1)
                length = (
                    struct.unpack("<Q", self.sound[".safetensors"][:8])[0]
                    + len(sound)
                    - len(self.sound[".safetensors"])
                )
                return self.raw(".safetensors", struct.pack("<Q", length) + sound[8:]), False
            case _:  # a storage of that length in a .pth, and a tensor as long
                storage = (
                    b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + word(size) + b"tQ"
                )
                shape = word(size) + b"\x85" + word(1) + b"\x85"
                tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + shape + b"\x89}tR"
                return self.torch_zip(b"\x80\x02}" + text("conv1.weight") + tensor + b"s."), False

    def hostile(self, number: int) -> Mutant:
        code = list(ROUTES.values())[number % 10](text(str(self.folder / "ran")))
        before = b"}" + text("conv1.weight") + b"K\x01s" * self.random.randint(0, 1)
        content = self.random.choice(
            [
                code,
                b"}" + text("conv1.weight") + code + b"s",
                b"}" + text("model") + b"}" + text("conv1.weight") + code + b"ss",
                b"](" + b"K\x01" * self.random.randint(0, 50) + code + b"e",
                before.replace(b"K\x01s", b"") + code + b"s" if before.endswith(b"t") else code + b"0}",
            ]
        )
        content = bytes([0x80, self.random.choice([2, 3, 4])]) + content + b"."
        match number // 10 % 3:
            case 0:
                return self.raw(".pkl", content), False
            case 1:
                return self.torch_zip(content), False
            case _:
                start = io.BytesIO(self.sound["old.pth"])
                for _ in range(3):
                    pickle.load(start)  # the three pickles of torch's own before the contents
                return self.raw("old.pth", start.getvalue()[: start.tell()] + content + b"\x80\x02]."), False

    def torch_zip(self, content: bytes) -> Path:
        path = self.folder / "mutant.pth"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (
                ("data.pkl", content),
                ("byteorder", b"little"),
                ("data/0", b"\0" * 40),
                ("version", b"3\n"),
            ):
                archive.writestr(f"x/{name}", data)
        return path


KINDS: Final = {
    "truncated": 400,
    "flipped": 400,
    "reshaped": 200,
    "not_finite": 150,
    "missing": 150,
    "extra": 150,
    "nested": 150,
    "huge": 100,
    "hostile": 300,
}


def snapshot(model: Backbone) -> dict[str, bytes]:
    return {key: value.numpy().tobytes() for key, value in model.state_dict().items()}


def refused(job: Callable[[], object], path: Path) -> bool:
    """Run ``job``; return whether it was refused, by one clear error in time."""
    started, message = time.perf_counter(), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a flipped byte may make a contradiction of what was none
            job()
    except ValueError as error:
        message = str(error)
    assert time.perf_counter() - started < SECONDS
    assert message is None or (message.startswith(f"{path}: ") and len(message) < 3000)
    return message is not None


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_are_refused_or_loaded_whole(tmp_path: Path, kind: str) -> None:
    maker, model = Maker(tmp_path), build(out_features=["c2"])
    model.preprocessing = BGR_255
    fresh, loads = snapshot(model), 0
    for number in range(KINDS[kind]):
        for old in tmp_path.iterdir():
            old.unlink()
        path, sound = getattr(maker, kind)(number)
        failed = refused(lambda path=path: load_weights(model, path, name="resnet18"), path)  # type: ignore[misc]
        assert sound is None or failed != sound, (kind, number)
        assert (snapshot(model) == fresh) == failed, (kind, number)
        if not failed:
            loads += 1
            assert all(value.isfinite().all() for value in model.state_dict().values())
            with torch.no_grad():
                for key, value in build(out_features=["c2"]).state_dict().items():
                    model.state_dict()[key].copy_(value)
            fresh = snapshot(model)
        elif number % 5 == 0:
            refused(lambda path=path: convert_weights(path, tmp_path / "out.pth", "timm"), path)  # type: ignore[misc]
        assert sorted(tmp_path.iterdir()) == [path], (kind, number)
    assert loads == {"nested": loads, "flipped": loads}.get(kind, 0)


def test_the_mutants_are_2000() -> None:
    assert sum(KINDS.values()) == 2000
    assert len(ROUTES) == 10


ODD: Final = {
    "attribute in the place of a method": b"ccollections\nOrderedDict\n)R}" + text("items") + b"K\x01sb.",
    "array as a key": b"}cnumpy\nndarray\nK\x01s.",
    "tuples nested without end": b"})" + b"\x85" * 10_000 + b"K\x01s.",
    "more tuples than the stack holds": b"})" + b"\x85" * 100_000 + b"K\x01s.",
    "more instructions than anyone needs": b"}" + b"K\x010" * 400_000 + b".",
    "state for a class": b"}" + text("x") + b"cnumpy\ndtype\n}b" + b"s.",
    "array of no type": b"}" + text("x") + b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01)K\x01\x89U\x04abcdtbs.",
    "array without contents": b"}" + text("conv1_w") + b"cnumpy.core.multiarray\n_reconstruct\n)Rs.",
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_pickle_is_refused_by_one_clear_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd.pkl"
    path.write_bytes(b"\x80\x04" + ODD[kind])
    assert refused(lambda: load_weights(build(out_features=["c2"]), path, name="resnet18"), path)
