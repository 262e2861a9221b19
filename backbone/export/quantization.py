"""An ONNX graph in int8, by ONNX Runtime's own quantiser: scales from calibration images, weights per channel."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from backbone.export.quiet import quiet


class _Images:
    """ONNX Runtime's ``CalibrationDataReader``."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next input by name; None at the end."""
        images = next(self._batches, None)
        return None if images is None else {"images": images.numpy()}


def quantise(model: Any, calibration: Sequence[Tensor], folder: Path) -> Any:  # noqa: ANN401 - a ModelProto
    """Return the graph in which ONNX Runtime computes all in int8 that it can; the rest stays in float32.

    Args:
        model: ONNX ModelProto in float32.
        calibration: Batches of images as the graph takes them.
        folder: For files that the quantiser needs in between; they are gone afterwards.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    CalibrationDataReader.register(_Images)
    before, after = folder / "float32.onnx", folder / "int8.onnx"
    try:
        before.write_bytes(model.SerializeToString())
        with quiet():
            quantize_static(
                before,
                after,
                _Images(calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8,
            )
        return onnx.load(after)
    finally:
        before.unlink(missing_ok=True)
        after.unlink(missing_ok=True)
