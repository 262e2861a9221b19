"""tools/benchmark.py: its arithmetic, who is told to be absent or wrong, and one small run."""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool() -> Any:
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("benchmark.command")
    sys.path.remove(str(TOOLS))


@pytest.fixture
def case(tool: Any) -> Any:
    return tool.Case(tool.Workload.INFER, "resnet18", 1, 64, 64, tool.DtypeName.FLOAT32, tool.DeviceName.CPU)


def run(tool: Any, *arguments: str) -> Any:
    small = ["--name", "resnet18", "--image-size", "64", "64", "--rounds", "2"]
    return CliRunner().invoke(tool.app, [*small, *arguments], catch_exceptions=False)


@pytest.fixture
def quick(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither long rounds nor large matrices: the numbers do not matter here."""
    measures = importlib.import_module("benchmark.measures")
    monkeypatch.setattr("backbone.command.timing.TIMED_SECONDS", 1e-4)
    monkeypatch.setattr(tool, "measure_machine", lambda *_: measures.Machine(1e11, 1e10))


def test_each_layer_is_bound_by_arithmetic_or_by_memory(tool: Any) -> None:
    measures = importlib.import_module("benchmark.measures")
    machine = measures.Machine(rate=100.0, bandwidth=10.0)
    arithmetic = tool.Layer(flops=1000, elements=5, residual=0, backward_passes=0)
    memory = tool.Layer(flops=10, elements=50, residual=25, backward_passes=0)
    assert machine.roofline([arithmetic], itemsize=4) == pytest.approx(10)
    assert machine.roofline([memory], itemsize=4) == pytest.approx(75 * 4 / 10)
    assert machine.roofline([arithmetic, memory], itemsize=2) == pytest.approx(10 + 75 * 2 / 10)


def test_backward_passes_read_no_residual(tool: Any) -> None:
    machine = importlib.import_module("benchmark.measures").Machine(rate=1e9, bandwidth=1.0)
    assert machine.roofline([tool.Layer(0, 10, 5, backward_passes=2)], itemsize=1) == pytest.approx(15 + 10 + 10)


def test_operations_are_those_of_the_paper(tool: Any, case: Any) -> None:
    """ResNet-18 at 224 pixels: 1.814 G multiply-adds, of which the classifier takes 0.5 M."""
    contender = tool.PEERS["torchvision"](tool.dataclasses.replace(case, height=224, width=224))
    assert tool.total_flops(tool.count_layers(contender)) == pytest.approx(2 * 1.8136e9, rel=1e-3)


def test_frozen_layers_have_no_backward(tool: Any, case: Any) -> None:
    training = tool.dataclasses.replace(case, workload=tool.Workload.TRAIN)
    passes = [layer.backward_passes for layer in tool.count_layers(tool.PEERS["torchvision"](training))]
    assert passes[:5] == [0] * 5  # the stem and C2
    assert sorted(passes[5:]) == [1, 1, *[2] * 13]  # C3's first two convolutions read C2, which wants no gradient


def test_ratios_are_paired_within_rounds(tool: Any) -> None:
    ours = [1.0, 5.0, 2.0, 9.0]  # the machine slowed down and recovered; both felt it
    assert tool.paired_ratio([3 * seconds for seconds in ours], ours) == pytest.approx((3, 3, 3))
    ratio, low, high = tool.paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert low < ratio == 3.0 < high


def test_equal_detections_may_come_in_another_order(tool: Any) -> None:
    rows = torch.tensor([[0, 1, 0.9, 0, 0, 10, 10], [0, 2, 0.8, 0, 0, 10, 10.0]])
    moved = rows + torch.tensor([0, 0, 0, 5, 5, 5, 5.0])
    assert tool.unequal_detections(rows.flip(0), rows) == 0
    assert tool.unequal_detections(moved, rows) == 1
    assert tool.unequal_detections(rows[:1], rows) == 0.5
    assert tool.unequal_detections(rows[:0], rows) == 1


def test_saved_bytes_leave_out_parameters_and_count_shared_memory_once(tool: Any) -> None:
    linear = nn.Linear(4, 4, bias=False)
    x = torch.randn(2, 4, requires_grad=True)

    def forward() -> list[Tensor]:
        return [linear(x), linear(x)]  # each saves x and the weight

    contender = tool.Contender("two products", forward, forward, linear)
    assert importlib.import_module("benchmark.measures").saved_bytes(contender) == 2 * 4 * 4


@pytest.mark.usefixtures("quick")
def test_a_run_prints_a_table_and_writes_json_and_picture(tool: Any, tmp_path: Path) -> None:
    results, picture = tmp_path / "out" / "results.json", tmp_path / "out" / "bars.png"
    output = run(
        tool, "--workload", "infer", "--workload", "train", "--peers", "torchvision,timm",
        "--json", str(results), "--picture", str(picture),
    )  # fmt: skip
    assert output.exit_code == 0, output.output
    infer, train = json.loads(results.read_text())
    names = [[row["name"] for row in record["contenders"]] for record in (infer, train)]
    tuned = ["torchvision", "torchvision, tuned", "timm", "timm, tuned"]
    assert names == [["ours", "ours (not optimised)", *tuned], ["ours", "torchvision", "timm"]]
    assert all(row["memory"] > 0 and len(row["times"]) == 2 for row in train["contenders"])
    assert {"date", "hardware", "versions", "command", "roofline"} <= set(infer)
    assert picture.read_bytes().startswith(b"\x89PNG")
    run(tool, "--peers", "", "--json", str(results))
    assert len(json.loads(results.read_text())) == 3


@pytest.mark.usefixtures("quick")
def test_a_model_of_timms_is_compared_with_timm(tool: Any, tmp_path: Path) -> None:
    arguments = ("--name", "timm/regnetx_002", "--peers", "torchvision,timm", "--workload", "train")
    output = run(tool, *arguments, "--dtype", "float32", "--json", str(tmp_path / "results.json"))
    assert output.exit_code == 0, output.output
    _, record = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in record["contenders"]] == ["ours", "timm"]
    assert record["absent"] == {"torchvision": "takes part with torchvision's models only"}


@pytest.mark.usefixtures("quick")
def test_norms_that_train_are_compared_in_training(tool: Any, tmp_path: Path) -> None:
    arguments = ("--workload", "train", "--norms-train", "--peers", "torchvision,timm,detectron2")
    output = run(tool, *arguments, "--json", str(tmp_path / "results.json"))
    assert output.exit_code == 0, output.output
    (record,) = json.loads((tmp_path / "results.json").read_text())
    ours, torchvision, timm = record["contenders"]
    assert [ours["name"], torchvision["name"], timm["name"]] == ["ours", "torchvision", "timm"]
    assert ours["memory"] < 0.7 * torchvision["memory"]  # the norms' inputs are not kept
    assert "detectron2" in record["absent"]


def test_norms_train_in_training_alone(tool: Any) -> None:
    output = run(tool, "--norms-train")
    assert output.exit_code == 2
    assert "--norms-train concerns training alone" in " ".join(output.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name", "timm/regnetx_002", "--workload", "detector"), "take --workload infer or train"),
        (("--name", "timm/convnext_tiny"), "must be of its modules resnet, regnet, got convnext_tiny"),
        (("--name", "timm/resnetv2_50"), "must be of its modules resnet, regnet, got resnetv2_50"),
    ],
)
def test_a_model_of_timms_that_cannot_be_compared_is_refused(tool: Any, arguments: Sequence[str], message: str) -> None:
    refused = run(tool, *arguments)
    assert refused.exit_code == 2
    assert message in " ".join(refused.output.replace("│", " ").split())


def test_a_model_of_timms_needs_timm(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    refused = run(tool, "--name", "timm/resnet50")
    assert refused.exit_code == 2
    assert "timm's models need timm: not importable" in " ".join(refused.output.replace("│", " ").split())


@pytest.mark.usefixtures("quick")
def test_an_absent_peer_is_named_with_the_reason(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    output = run(tool, "--peers", "openvino").output
    assert "absent: openvino: not importable" in output


@pytest.mark.usefixtures("quick")
def test_a_peer_that_computes_something_else_is_not_timed(
    tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = tool.PEERS["torchvision"]

    def wrong(case: Any) -> Any:
        contender = right(case)
        contender.network.conv1.weight.data[0] *= 1.001
        return contender

    monkeypatch.setitem(tool.PEERS, "torchvision", wrong)
    output = run(tool, "--peers", "torchvision", "--json", str(tmp_path / "results.json"))
    assert "rejected: torchvision: features differ by" in output.output
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert "torchvision" not in [row["name"] for row in record["contenders"]]


def test_unknown_peers_are_refused(tool: Any) -> None:
    output = run(tool, "--peers", "tensorflow")
    assert output.exit_code == 2
    assert "unknown peers tensorflow" in output.output


@pytest.mark.usefixtures("quick")
def test_int8_is_compared_with_our_floats_and_quantised_peers(tool: Any, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    output = run(tool, "--dtype", "int8", "--peers", "onnxruntime,openvino,timm", "--json", str(results))
    assert output.exit_code == 0, output.output
    (record,) = json.loads(results.read_text())
    names = [row["name"] for row in record["contenders"]]
    assert names[:3] == ["ours", "ours float32", "ours bfloat16"]
    assert "onnxruntime" in names
    assert "openvino" in [*names, *record["absent"]]  # NNCF may be absent
    assert record["absent"]["timm"].startswith("has no int8")
    assert not record["rejected"]


def test_int8_training_is_refused(tool: Any) -> None:
    assert run(tool, "--dtype", "int8", "--workload", "train").exit_code == 2


@pytest.mark.usefixtures("quick")
def test_a_pyramid_is_compared_with_torchvisions(tool: Any, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    output = run(tool, "--pyramid", "--peers", "torchvision,timm,onnxruntime", "--json", str(results))
    assert output.exit_code == 0, output.output
    (record,) = json.loads(results.read_text())
    names = {row["name"] for row in record["contenders"]}
    assert names >= {"ours", "torchvision", "torchvision, tuned"}
    assert record["absent"]["timm"] == "has no pyramid"
    assert all(row["error"] < 1e-5 for row in record["contenders"])
    assert "with a pyramid" in record["title"]
    refused = run(tool, "--pyramid", "--workload", "train")
    assert refused.exit_code == 2
    assert "--pyramid concerns inference alone" in " ".join(refused.output.replace("│", " ").split())
