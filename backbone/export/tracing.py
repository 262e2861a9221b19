"""torch.export of a network, of any image size and batch or of one."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes

from backbone.export.folding import fold_norms
from backbone.export.network import Network
from backbone.export.padding import cancelling_sizes
from backbone.export.quiet import quiet
from backbone.export.request import Request
from backbone.export.resizing import AntialiasingAsProducts

AXES = ("batch", "height", "width")


class Traced(NamedTuple):
    """A network as torch.export sees it.

    Attributes:
        program: Its norms folded.
        symbols: The program's own name of each axis of the images that may vary -> ``batch``, ``height``, ``width``.
        smallest: Smallest height and width in pixels that the trace promises to hold for.
        folded: Number of norms folded.
    """

    program: ExportedProgram
    symbols: dict[str, str]
    smallest: tuple[int, int]
    folded: int


def trace(network: Network, request: Request) -> Traced:
    """Trace the network with the axes that ``request`` leaves open.

    Raises:
        ValueError: If an axis that shall vary cannot.
    """
    images = example_images(network, request)
    varying = [request.batch is None, *(request.image_size is None or network.resizes_to is not None,) * 2]
    spec = {axis: Dim.AUTO for axis, varies in zip((0, 2, 3), varying, strict=True) if varies}
    inputs: tuple[Tensor, ...] = (images,)
    shapes: tuple[Any, ...] = (spec or None,)
    if network.detector is not None:
        height, width = images.shape[2:]
        inputs = (images, torch.tensor([float(height), float(width)]), torch.ones(4))
        shapes = (*shapes, None, None)
    resizing = AntialiasingAsProducts() if request.to in ("onnx", "openvino") else nullcontext()
    # Without the patch the question whether a cropped map is contiguous would fix the image's size.
    any_contiguity = symbolic_shapes.patch(backed_size_oblivious=True)  # type: ignore[attr-defined] # a config module's
    with quiet(), torch.no_grad(), any_contiguity, resizing, cancelling_sizes():
        try:
            program = torch.export.export(network.module, inputs, dynamic_shapes=shapes, strict=False)
        except (RuntimeError, torch._dynamo.exc.UserError) as error:
            raise ValueError(f"torch.export cannot follow this network: {_first_line(error)}") from error
    folded = fold_norms(program)
    symbols, smallest = _varying(program, images, spec)
    return Traced(program, symbols, smallest, folded)


def example_images(network: Network, request: Request) -> Tensor:
    """Return images to trace with: already resized and padded for a detector."""
    height, width = network.example_size
    dtype = torch.uint8 if network.takes_bytes else torch.float32
    if network.detector is not None:
        divisor = int(network.detector.transform.size_divisible)  # type: ignore[union-attr, arg-type]
        from backbone.export.detection.front import resized_size

        shape = resized_size(network.detector.transform, height, width)
        height, width = (-(-side // divisor) * divisor for side in shape)
        dtype = torch.float32
    return torch.zeros(request.batch or 2, network.channels, height, width, dtype=dtype)


def _varying(program: ExportedProgram, images: Tensor, spec: dict[int, Any]) -> tuple[dict[str, str], tuple[int, int]]:
    """Return the symbols of the axes in ``spec`` and the smallest image; refuse an axis that became a constant."""
    inputs = program.graph_signature.user_inputs
    shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == inputs[0])
    names = dict(zip((0, 2, 3), AXES, strict=True))
    symbols, smallest = {}, {2: images.shape[2], 3: images.shape[3]}
    for axis in spec:
        if not isinstance(shape[axis], torch.SymInt):
            option = "--batch" if axis == 0 else "--image-size"
            raise ValueError(
                f"this network's {names[axis]} cannot vary: its code fixes it to that of the image it is traced with; "
                f"give {option}"
            )
        symbols[str(shape[axis])] = names[axis]
        if axis:
            bounds = program.range_constraints.get(shape[axis].node.expr)
            smallest[axis] = max(int(bounds.lower), 1) if bounds is not None else 1
    return symbols, (smallest[2], smallest[3])


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
