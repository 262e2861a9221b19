"""A file in the runtime it was made for."""

import importlib
import zipfile
from pathlib import Path
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from backbone.export.metadata import PREFIX
from backbone.export.request import SUFFIXES, Target, require_libraries

_MODULES: Final = {
    "onnx": "onnx",
    "openvino": "openvino",
    "aoti": "aoti",
    "torch-export": "torch_export",
    "executorch": "executorch",
}


class Runner(Protocol):
    """A loaded file."""

    metadata: dict[str, str]

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Images (N, C, H, W) -> outputs by name."""
        ...


def load(file: Path, target: Target) -> Runner:
    """Load ``file`` in the runtime of ``target``."""
    require_libraries(target)
    runner: Runner = importlib.import_module(f"backbone.export.{_MODULES[target]}").Runner(file)
    return runner


def target_of(file: Path) -> Target:
    """Return what ``file`` was made for.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of no target.
    """
    if not file.is_file():
        raise FileNotFoundError(f"the file to check must exist, got {file}; check the path")
    targets = [target for target, suffix in SUFFIXES.items() if suffix == file.suffix]
    if not targets:
        raise ValueError(f"an exported file ends in one of {', '.join(dict.fromkeys(SUFFIXES.values()))}, got {file}")
    if len(targets) == 1:
        return targets[0]
    try:
        with zipfile.ZipFile(file) as archive:
            compiled = any("/data/aotinductor/" in name for name in archive.namelist())
    except zipfile.BadZipFile:
        raise ValueError(f"{file}: is no archive of torch.export or AOTInductor; export it again") from None
    return "aoti" if compiled else "torch-export"


def read_metadata(file: str | Path) -> dict[str, str]:
    """Return what an exported file says of itself; values that are not text are JSON.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file of ``export_model``.
    """
    path = Path(file)
    try:
        metadata = load(path, target_of(path)).metadata
    except (RuntimeError, TypeError, KeyError) as error:  # each runtime has its own
        raise ValueError(f"{path}: cannot be loaded ({' '.join(str(error).split())[:200]}); export it again") from None
    except Exception as error:
        if type(error).__module__.startswith(("onnxruntime", "openvino")):
            raise ValueError(
                f"{path}: cannot be loaded ({' '.join(str(error).split())[:200]}); export it again"
            ) from None
        raise
    return {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
