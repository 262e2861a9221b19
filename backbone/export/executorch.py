"""ExecuTorch programs with XNNPACK: for phones and small machines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from backbone.export.quiet import quiet
from backbone.export.torch_export import forget_the_machine

Arrays = dict[str, NDArray[Any]]


def write(program: ExportedProgram, draft: Path, metadata: Mapping[str, str]) -> None:
    """Lower the program to XNNPACK and write it; its method ``backbone_metadata`` gives the metadata as JSON."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    forget_the_machine(program)
    with quiet():
        lowered = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            constant_methods={"backbone_metadata": json.dumps(dict(metadata))},
        ).to_executorch()
        draft.write_bytes(lowered.buffer)


class Runner:
    """A program in ExecuTorch's Python runtime.

    Args:
        file: The ``.pte``.
    """

    def __init__(self, file: Path) -> None:
        from executorch.runtime import Runtime

        self._program = Runtime.get().load_program(file)
        self._method = self._program.load_method("forward")
        text = self._program.load_method("backbone_metadata").execute(())[0]
        self.metadata: dict[str, str] = json.loads(text)
        self._names: Sequence[str] = json.loads(self.metadata["backbone_outputs"])

    def __call__(self, images: NDArray[Any]) -> Arrays:
        """Images (N, C, H, W) -> outputs by name."""
        outputs = self._method.execute((torch.from_numpy(images),))
        return {name: value.clone().numpy() for name, value in zip(self._names, outputs, strict=True)}
