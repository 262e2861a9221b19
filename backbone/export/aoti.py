"""AOTInductor packages: compiled code and weights, for a process with torch and without this package."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from backbone.export.quiet import quiet
from backbone.export.torch_export import forget_the_machine

Arrays = dict[str, NDArray[Any]]


def write(program: ExportedProgram, draft: Path, metadata: Mapping[str, str]) -> None:
    """Compile the program for this machine's CPU and write the package."""
    forget_the_machine(program)
    package = io.BytesIO()  # torch's own writer ends the process where the disk is full
    with quiet():
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=package,
            inductor_configs={"aot_inductor.metadata": dict(metadata), "aot_inductor.package": True},
        )
    draft.write_bytes(package.getbuffer())


class Runner:
    """A package in AOTInductor's runtime.

    Args:
        file: The ``.pt2``.
    """

    def __init__(self, file: Path) -> None:
        with quiet():
            self._model = torch._inductor.aoti_load_package(str(file))
        self.metadata: dict[str, str] = dict(self._model.loader.get_metadata())

    def __call__(self, images: NDArray[Any]) -> Arrays:
        """Images (N, C, H, W) -> outputs by name."""
        with torch.no_grad():
            return {name: value.numpy() for name, value in self._model(torch.from_numpy(images)).items()}
