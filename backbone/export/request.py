"""What is asked of an export, checked before anything heavy is imported. This file knows no torch."""

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from backbone.config import did_you_mean

Target = Literal["onnx", "openvino", "aoti", "torch-export", "executorch"]
DType = Literal["float32", "float16", "bfloat16", "int8"]

TARGETS: Final[tuple[Target, ...]] = get_args(Target)
DTYPES: Final[tuple[DType, ...]] = get_args(DType)
SUFFIXES: Final[Mapping[Target, str]] = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "aoti": ".pt2",
    "torch-export": ".pt2",
    "executorch": ".pte",
}
DEFAULT_OPSET: Final = 18
"""RoiAlign with half pixels needs 16, Resize with antialiasing 18; TensorRT 10 and OpenVINO 2024 read it."""

_NEEDED: Final[Mapping[Target, tuple[str, ...]]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "aoti": (),
    "torch-export": (),
    "executorch": ("executorch",),
}
_DTYPES_OF: Final[Mapping[Target, tuple[DType, ...]]] = {
    "onnx": ("float32", "float16", "int8"),
    "openvino": ("float32", "float16", "int8"),
    "aoti": ("float32", "bfloat16", "float16"),
    "torch-export": ("float32", "bfloat16", "float16"),
    "executorch": ("float32",),
}
_WHY_NOT: Final[Mapping[tuple[Target, DType], str]] = {
    ("onnx", "bfloat16"): "ONNX Runtime has no bfloat16 convolution on a CPU, where the file is checked; use float16",
    ("openvino", "bfloat16"): "OpenVINO chooses bfloat16 itself where the CPU has it, by INFERENCE_PRECISION_HINT",
    ("aoti", "int8"): "AOTInductor compiles quantised models of torchao, from the float32 model",
    ("torch-export", "int8"): "a torch.export file is quantised by torchao, from the float32 file",
    ("executorch", "int8"): "ExecuTorch is quantised by torchao's XNNPACK quantizer, from the float32 model",
    ("executorch", "float16"): "XNNPACK's partitioner takes float32; use that",
    ("executorch", "bfloat16"): "XNNPACK's partitioner takes float32; use that",
}


class MissingExtraError(ModuleNotFoundError):
    """A library that a target needs is not installed; the message names the extra."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of one export.

    Attributes:
        path: The file to write.
        to: Runtime it is for.
        image_size: Height and width in pixels; None for any.
        batch: Images at a time; None for any number.
        dtype: What the network computes in; inputs and outputs are float32 all the same.
        opset: Of ONNX.
        with_preprocessing: Whether the file takes uint8 RGB images and prepares them itself.
        class_names: By label, for the metadata.
        triton: Folder of a Triton model repository to write an entry into, or None.

    Raises:
        ValueError: If something is not on offer, or the path cannot be written.
        MissingExtraError: If a library is missing.
    """

    path: Path
    to: Target
    image_size: tuple[int, int] | None = None
    batch: int | None = None
    dtype: DType = "float32"
    opset: int = DEFAULT_OPSET
    with_preprocessing: bool = False
    class_names: Sequence[str] = ()
    triton: Path | None = None

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise ValueError(f"unknown target {self.to!r}{did_you_mean(self.to, TARGETS)} known: {', '.join(TARGETS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.dtype not in _DTYPES_OF[self.to]:
            raise ValueError(f"dtype {self.dtype} is not on offer for {self.to}: {_WHY_NOT[self.to, self.dtype]}")
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):  # noqa: PLR2004
            raise ValueError(f"image_size must be a height and a width of at least 1 pixel, got {self.image_size}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch must be at least 1, or None for any number of images, got {self.batch}")
        if self.opset < DEFAULT_OPSET:
            raise ValueError(f"opset must be at least {DEFAULT_OPSET}, got {self.opset}; leave it out")
        if self.triton is not None and self.to not in ("onnx", "openvino"):
            raise ValueError(f"a Triton entry is written for onnx and openvino, got {self.to}; leave triton out")
        self._check_path()
        if self.triton is not None:
            require_writable(next(folder for folder in (self.triton, *self.triton.parents) if folder.exists()))
        require_libraries(self.to)
        if (self.to, self.dtype) == ("openvino", "int8") and importlib.util.find_spec("nncf") is None:
            raise MissingExtraError("int8 for openvino needs nncf, which quantises: pip install nncf")

    def _check_path(self) -> None:
        suffix = SUFFIXES[self.to]
        if self.path.suffix != suffix:
            raise ValueError(f"the file for {self.to} must end in {suffix}, got {self.path}; rename it")
        if self.path.is_dir():
            raise ValueError(f"the path must be a file's, got the folder {self.path}; add a name")
        require_writable(self.path.parent)


def require_libraries(target: Target) -> None:
    """Raise MissingExtraError unless everything is installed that ``target`` needs."""
    missing = [name for name in _NEEDED[target] if importlib.util.find_spec(name) is None]
    if missing:
        extra = "pip install executorch" if target == "executorch" else "pip install 'backbone[export]'"
        raise MissingExtraError(f"{target} needs {' and '.join(missing)}: {extra}")


def require_writable(folder: Path) -> None:
    """Raise ValueError unless files can be made in ``folder``; nothing is left there."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"the folder must exist and be writable, got {folder} ({error.strerror})") from None
