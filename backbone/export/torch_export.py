"""torch.export's own archive: for another process with torch, without this package."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from backbone.export.quiet import quiet

Arrays = dict[str, NDArray[Any]]

_METADATA = "backbone.json"


def write(program: ExportedProgram, draft: Path, metadata: Mapping[str, str]) -> None:
    """Write the program, without this machine's paths, and the metadata beside it in the archive."""
    forget_the_machine(program)
    program._example_inputs = None  # they alone would be pickled
    archive = io.BytesIO()  # torch's own writer ends the process where the disk is full
    with quiet():
        torch.export.save(program, archive, extra_files={_METADATA: json.dumps(dict(metadata))})
    draft.write_bytes(archive.getbuffer())


def forget_the_machine(program: ExportedProgram) -> None:
    """Drop the stack traces that torch.export keeps with every operation."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
                node.stack_trace = None


class Runner:
    """An archive of torch.export in PyTorch.

    Args:
        file: The ``.pt2``.
    """

    def __init__(self, file: Path) -> None:
        extra = {_METADATA: ""}
        with quiet():
            program = torch.export.load(file, extra_files=extra)
            self._module = program.module()
        self.metadata: dict[str, str] = json.loads(extra[_METADATA] or "{}")

    def __call__(self, images: NDArray[Any]) -> Arrays:
        """Images (N, C, H, W) -> outputs by name."""
        with torch.no_grad():
            return {name: value.numpy() for name, value in self._module(torch.from_numpy(images)).items()}
