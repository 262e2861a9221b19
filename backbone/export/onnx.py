"""ONNX files: torch.onnx's dynamo exporter, then names and metadata a deployer can use, and nothing of this machine."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from backbone.export.network import Network
from backbone.export.quiet import quiet
from backbone.export.request import Request
from backbone.export.tracing import Traced

Arrays = dict[str, NDArray[Any]]

_JOINTS: Final = {"resized": "resized_images", "image_size": "resized_size", "ratio": "size_ratio"}
"""Outputs of a detector's front -> inputs of its network."""

LARGEST_FILE: Final = 2**31 - 1
"""Bytes of one protobuf message; a larger network would need a second file."""


def build(network: Network, traced: Traced, request: Request, metadata: Mapping[str, str]) -> Any:  # noqa: ANN401
    """Return the complete ModelProto."""
    import onnx

    model = _convert(network, traced, request)
    if network.detector is not None:
        model = _with_front(model, network, request)
    _forget_the_machine(model)
    _name_axes(model, traced.symbols)
    model.producer_name, model.producer_version = "backbone", metadata["backbone_version"]
    model.graph.name = "backbone"
    onnx.helper.set_model_props(model, dict(metadata))
    if model.ByteSize() > LARGEST_FILE:
        raise ValueError(f"an ONNX file holds at most 2 GiB, got {model.ByteSize():,} bytes; use dtype float16")
    onnx.checker.check_model(model)
    return model


def write(model: Any, draft: Path) -> None:  # noqa: ANN401 - a ModelProto
    """Write the ModelProto."""
    draft.write_bytes(model.SerializeToString(deterministic=True))


def _convert(network: Network, traced: Traced, request: Request) -> Any:  # noqa: ANN401
    translations = None
    inputs = ["images"]
    if network.detector is not None:
        from backbone.export.detection.onnx_operators import translations as table

        translations, inputs = table(), list(_JOINTS.values())
    with quiet(), torch.no_grad():
        converted = torch.onnx.export(
            traced.program,
            dynamo=True,
            input_names=inputs,
            output_names=list(network.outputs),
            opset_version=request.opset,
            custom_translation_table=translations,
            verbose=False,
        )
        assert converted is not None
        return converted.model_proto


def _with_front(model: Any, network: Network, request: Request) -> Any:  # noqa: ANN401
    """Put the detector's own resizing and normalising before its network."""
    from onnx import compose

    from backbone.export.detection.front import front_graph

    assert network.detector is not None
    front = front_graph(
        network.detector.transform,
        network.channels,
        takes_bytes=network.takes_bytes,
        opset=model.opset_import[0].version,
        batch=request.batch,
        image_size=request.image_size,
    )
    front.ir_version = model.ir_version
    front = compose.add_prefix(front, "front/", rename_inputs=False)
    return compose.merge_models(front, model, io_map=[(f"front/{output}", name) for output, name in _JOINTS.items()])


def _forget_the_machine(model: Any) -> None:  # noqa: ANN401
    """Drop what the exporter notes for itself: stack traces with this machine's paths, and comments."""
    del model.metadata_props[:]
    model.doc_string = ""
    _forget(model.graph)
    for function in model.functions:
        del function.metadata_props[:]
        function.doc_string = ""
        for node in function.node:
            _forget_node(node)


def _forget(graph: Any) -> None:  # noqa: ANN401
    del graph.metadata_props[:]
    graph.doc_string = ""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    for node in graph.node:
        _forget_node(node)


def _forget_node(node: Any) -> None:  # noqa: ANN401
    del node.metadata_props[:]
    node.doc_string = ""
    for attribute in node.attribute:
        attribute.doc_string = ""
        for graph in (attribute.g, *attribute.graphs):
            if graph.node:
                _forget(graph)


def _name_axes(model: Any, symbols: Mapping[str, str]) -> None:  # noqa: ANN401
    """Call the axes of the images batch, height and width, also where other sizes are computed from them."""
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b") if symbols else None
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if pattern is not None and dim.dim_param:
                dim.dim_param = pattern.sub(lambda found: symbols[found[0]], dim.dim_param)


class Runner:
    """An ONNX file in ONNX Runtime.

    Args:
        file: The file.
    """

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def __call__(self, images: NDArray[Any]) -> Arrays:
        """Images (N, C, H, W) -> outputs by name."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, map(np.asarray, self._session.run(names, {"images": images})), strict=True))
