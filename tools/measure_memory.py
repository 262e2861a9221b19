"""What an inference copy adds to a process, resident and at the peak of a call, beside OpenVINO and ONNX Runtime.

    python tools/measure_memory.py --name resnet50 --image-size 480 640

Every contender has a process of its own. Counted is what it adds to the memory after the libraries are imported. Peers
quantise by NNCF and ONNX Runtime's own quantiser, with the same three random batches as ours. Linux only.
"""

import ctypes
import gc
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from backbone import BackboneConfig, build_backbone, optimize_for_inference
from backbone.export.quantization import quantise
from backbone.norm import thaw_norms

CALLS = 4
OURS: dict[str, dict[str, Any]] = {
    "float32 copy": {},
    "float32 copy, keep_weights=False": {"keep_weights": False},
    "bf16 copy, keep_weights=False": {"dtype": torch.bfloat16, "keep_weights": False},
    "int8 copy": {"dtype": torch.int8},
    "int8 copy, keep_weights=False": {"dtype": torch.int8, "keep_weights": False},
}
PEERS = ("OpenVINO float32", "OpenVINO int8", "ONNX Runtime float32", "ONNX Runtime int8")
MIB = 1024


def batches(size: tuple[int, int]) -> list[torch.Tensor]:
    """Three random batches of one image."""
    return [torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def prepare(name: str, size: tuple[int, int], folder: Path) -> None:
    """Write weights, ranges and the peers' files into ``folder``."""
    import nncf
    import onnx
    import openvino
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model, images = build_backbone(BackboneConfig(name=name)).eval(), batches(size)
    torch.save(model.state_dict(), folder / "model.pt")
    copy: Any = optimize_for_inference(model, dtype=torch.int8, calibration=images)
    copy.calibration.save(folder / "ranges.json")
    plain, floats = thaw_norms(model).eval(), folder / "network.onnx"
    torch.onnx.export(plain, (images[0],), floats, dynamo=False, opset_version=17, input_names=["images"])
    data = nncf.Dataset(images, lambda batch: batch.numpy())
    network = nncf.quantize(openvino.Core().read_model(floats), data, subset_size=len(images))
    openvino.save_model(network, folder / "int8.xml")
    quant_pre_process(str(floats), str(folder / "prepared.onnx"), skip_symbolic_shape=True)
    onnx.save(quantise(onnx.load(folder / "prepared.onnx"), images, folder), folder / "int8.onnx")


def ours(name: str, folder: Path, settings: dict[str, Any] | None) -> Callable[[torch.Tensor], object]:
    """Build the model, or its copy, as a program that serves would."""
    model = build_backbone(BackboneConfig(name=name)).eval()
    model.load_state_dict(torch.load(folder / "model.pt"))
    if settings is None:
        return model
    ranges = folder / "ranges.json" if settings.get("dtype") == torch.int8 else None
    return optimize_for_inference(model, calibration=ranges, **settings)


def peer(contender: str, folder: Path) -> Callable[[torch.Tensor], object]:
    """Load a peer's file, on one thread."""
    is_int8 = contender.endswith("int8")
    if contender.startswith("OpenVINO"):
        import openvino

        path = folder / ("int8.xml" if is_int8 else "network.onnx")
        settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
        core = openvino.Core()
        request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
        return lambda images: request.infer([images.numpy()])
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = folder / ("int8.onnx" if is_int8 else "network.onnx")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def kibibytes(key: str) -> int:
    """Read one line of the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def settle() -> int:
    """Give back what is free and return the resident memory."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return kibibytes("VmRSS")


def measure(contender: str, name: str, size: tuple[int, int], folder: Path) -> None:
    """Print what one contender adds."""
    torch.set_num_threads(1)
    images = batches(size)[0]
    torch.nn.functional.conv2d(torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3))  # what torch itself keeps
    if contender in PEERS:
        __import__("openvino" if contender.startswith("OpenVINO") else "onnxruntime")
    before = settle()
    run = peer(contender, folder) if contender in PEERS else ours(name, folder, OURS.get(contender))
    with torch.inference_mode():
        for _ in range(CALLS):
            run(images)
        resident = settle()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        run(images)
    peak = kibibytes("VmHWM")
    print(f"{contender:<34} {(resident - before) / MIB:5.0f} MiB, peak {(peak - before) / MIB:5.0f} MiB")


def main(
    name: Annotated[str, typer.Option()] = "resnet50",
    image_size: Annotated[tuple[int, int], typer.Option(metavar="H W")] = (480, 640),
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure every contender in a process of its own."""
    if only is not None and folder is not None:
        measure(only, name, image_size, folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        prepare(name, image_size, Path(scratch))
        common = ["--name", name, "--image-size", *map(str, image_size), "--folder", scratch]
        for contender in ("the model itself", *OURS, *PEERS):
            subprocess.run([sys.executable, __file__, *common, "--only", contender], check=True)


if __name__ == "__main__":
    typer.run(main)
