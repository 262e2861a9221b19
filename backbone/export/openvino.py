"""OpenVINO IR: the ONNX graph read by OpenVINO, its weights in a ``.bin`` beside the ``.xml``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from backbone.export.quiet import quiet

Arrays = dict[str, NDArray[Any]]


def write(
    model: Any,  # noqa: ANN401
    draft: Path,
    metadata: Mapping[str, str],
    *,
    half_weights: bool,
    calibration: Sequence[Tensor] = (),
) -> None:
    """Convert the ModelProto and write ``draft`` and, beside it, its weights.

    Args:
        model: An ONNX ModelProto.
        draft: The ``.xml``.
        metadata: For the file's runtime information, under ``backbone``.
        half_weights: Whether weights are kept in float16; what they are computed in is the runtime's choice.
        calibration: Batches of images as the graph takes them, for NNCF to make it int8; none leaves it as it is.
    """
    import openvino

    converted = openvino.Core().read_model(model.SerializeToString())
    if calibration:
        converted = _quantised(converted, calibration)
    for key, value in metadata.items():
        converted.set_rt_info(value, ["backbone", key])
    openvino.save_model(converted, draft, compress_to_fp16=half_weights)


def _quantised(model: Any, calibration: Sequence[Tensor]) -> Any:  # noqa: ANN401 - OpenVINO's models
    import nncf

    images = nncf.Dataset(calibration, lambda batch: {"images": batch.numpy()})
    with quiet():
        return nncf.quantize(model, images, preset=nncf.QuantizationPreset.MIXED, subset_size=len(calibration))


class Runner:
    """An IR in OpenVINO's CPU plugin.

    Args:
        file: The ``.xml``.
    """

    def __init__(self, file: Path) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(file)
        self.metadata: dict[str, str] = {}
        if model.has_rt_info("backbone"):
            entries = model.get_rt_info("backbone").value
            self.metadata = {str(key): str(getattr(value, "value", value)) for key, value in entries.items()}
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self._compiled = core.compile_model(model, "CPU", settings)  # by default a CPU with AMX computes in bfloat16

    def __call__(self, images: NDArray[Any]) -> Arrays:
        """Images (N, C, H, W) -> outputs by name."""
        outputs = self._compiled({"images": images})
        return {output.get_any_name(): outputs[output].copy() for output in self._compiled.outputs}
