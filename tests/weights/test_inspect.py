"""A checkpoint described from itself alone, in Python and on the command line; and the memory that a load takes."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from foreign import State
from safetensors.torch import save_file
from typer.testing import CliRunner

from backbone import inspect_weights
from backbone.command.app import app
from backbone.providers.resnet.network import FAMILY, ResNet

ROOT = Path(__file__).parents[2]


def shapes_of(name: str) -> State:
    """Return a state dict of the network's shapes that takes little room: only norms and biases have numbers."""
    with torch.device("meta"):
        state = ResNet(FAMILY[name], norm="bn", num_classes=1000).state_dict()
    return {
        key: value if value.ndim > 1 else torch.ones(value.shape, dtype=value.dtype) for key, value in state.items()
    }


def saved(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "x.pth")
    return folder / "x.pth"


@pytest.mark.parametrize("names", [dict, foreign.detectron2_names], ids=["torchvision", "detectron2"])
@pytest.mark.parametrize("name", FAMILY)
def test_network_is_named_from_the_file_alone(tmp_path: Path, name: str, names: Any) -> None:
    if names is foreign.detectron2_names and FAMILY[name].deep_stem:
        pytest.skip("detectron2 has no names for a ResNet-D of this layout")
    assert inspect_weights(saved(names(shapes_of(name)), tmp_path)).network == name


def test_depth_of_no_known_network_is_described(tmp_path: Path) -> None:
    state = {key: value for key, value in shapes_of("resnet101").items() if not key.startswith("layer3.22.")}
    network = inspect_weights(saved(state, tmp_path)).network
    assert network == "no ResNet of this family: Bottleneck, depths (3, 4, 22, 3), 1 groups of 64 channels"


@pytest.mark.parametrize(
    ("name", "words"), [("resnet50", "1x1 (v1)"), ("resnext101_32x8d", "3x3 (v1.5)"), ("resnet18", "BGR, 0 to 255")]
)
def test_stride_placement_of_folded_norms_is_told(tmp_path: Path, name: str, words: str) -> None:
    state = shapes_of(name)
    zero = {key: torch.zeros(value.shape) for key, value in state.items() if key.endswith("running_mean")}
    path = saved({"model": foreign.under("backbone.bottom_up.", foreign.detectron2_names({**state, **zero}))}, tmp_path)
    assert words in inspect_weights(path).training[0]


def test_torchvisions_names_are_told_as_v15(tmp_path: Path) -> None:
    assert inspect_weights(saved(shapes_of("resnet50"), tmp_path)).training[0].startswith("stride in the 3x3 (v1.5)")


NORMS: dict[str, tuple[str, float, str]] = {
    "negative": ("running_var", -1.0, "wrong: 4800 variances below 0"),
    "not finite": ("running_mean", float("nan"), "wrong: not all of them finite"),
    "uneven": ("running_var", 3.5, "variances from 3.5 to 3.5"),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norm_statistics_are_judged(tmp_path: Path, kind: str) -> None:
    ending, value, sentence = NORMS[kind]
    state = shapes_of("resnet18")
    state |= {key: torch.full(t.shape, value) for key, t in state.items() if key.endswith(ending)}
    assert sentence in inspect_weights(saved(state, tmp_path)).norms


def test_file_of_no_known_network_is_described_all_the_same(tmp_path: Path) -> None:
    found = inspect_weights(saved({"blocks.0.attn.qkv.weight": torch.ones(6, 2)}, tmp_path))
    assert (found.format, found.network, list(found.tensors)) == ("unknown", "unknown", ["blocks.0.attn.qkv.weight"])


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=200)
    return result.exit_code, " ".join(result.output.split())


def test_inspect_command_tells_all_at_a_glance(tmp_path: Path) -> None:
    content = foreign.moco(shapes_of("resnet50"))
    code, output = run("inspect", saved({**content, "state_dict": {**content["state_dict"]}}, tmp_path))
    assert code == 0
    for words in (
        "self-supervised",
        "resnet50",
        "state_dict.module.encoder_q.",
        "v1.5",
        "encoder_k (320)",
        "64 x 3 x 7 x 7",
    ):
        assert words in output


def test_inspect_command_lists_what_nothing_explains(tmp_path: Path) -> None:
    assert (
        "unexplained gate.weight"
        in run("inspect", saved({**shapes_of("resnet18"), "gate.weight": torch.ones(1)}, tmp_path))[1]
    )


def test_convert_command_writes_and_reports(tmp_path: Path) -> None:
    path = saved(foreign.torchvision_network().state_dict(), tmp_path)
    code, output = run("convert", path, tmp_path / "out.pkl", "--to", "detectron2")
    assert code == 0
    assert "torchvision resnet18" in output
    assert inspect_weights(tmp_path / "out.pkl").format == "detectron2"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "nowhere.pth"), "nowhere.pth"),
        (("convert", "nowhere.pth", "out.pth", "--to", "timm"), "nowhere.pth"),
        (("convert", "nowhere.pth", "out.pth", "--to", "mxnet"), "got 'mxnet'"),
        (("convert", "nowhere.pth", "out.pkl", "--to", "timm"), "must end in"),
    ],
)
def test_mistake_on_the_command_line_is_one_message(arguments: tuple[str, ...], words: str) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert words in output
    assert "Traceback" not in output


def test_describe_command_reports_how_weights_fit(tmp_path: Path) -> None:
    code, output = run(
        "describe",
        "resnet18",
        "--weights",
        saved({"ema": foreign.torchvision_network("resnet18").state_dict()}, tmp_path),
    )
    assert code == 0
    assert "prefix stripped: ema." in output


LOAD: str = """
import resource, sys
import torch
from backbone.providers.resnet.network import FAMILY, ResNet
from backbone.weights import load_weights
torch.set_num_threads(1)
def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
with torch.device("meta"):
    model = ResNet(FAMILY["wide_resnet101_2"], norm="bn", num_classes=1000)
model = model.to_empty(device="cpu")
for tensor in (*model.parameters(), *model.buffers()):
    tensor.data.fill_(1)
size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
anonymous, peak = status("RssAnon"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_weights(model, sys.argv[1], name="wide_resnet101_2")
print(size // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak, status("RssAnon") - anonymous)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_500_megabytes_load_into_little_more_than_the_file_itself(tmp_path: Path, suffix: str) -> None:
    shapes = shapes_of("wide_resnet101_2")
    state = {key: torch.ones(value.shape, dtype=value.dtype) for key, value in shapes.items()}
    if suffix == ".pth":
        torch.save(state, tmp_path / "x.pth")
    else:
        save_file(state, tmp_path / "x.safetensors")
    del state
    command = [sys.executable, "-c", LOAD, str(tmp_path / f"x{suffix}")]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    (tmp_path / f"x{suffix}").unlink()  # pytest would keep it for three runs
    assert done.returncode == 0, done.stderr
    size, peak, kept = (int(number) for number in re.findall("-?[0-9]+", done.stdout))  # KiB
    assert size > 480 * 1024
    assert peak < 1.15 * size  # pages of the mapped file, which the system takes back when it likes
    assert kept < 0.1 * size
