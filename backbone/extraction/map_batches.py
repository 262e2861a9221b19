"""Features as a step of somebody's own Ray Data pipeline."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from backbone.builder import build_backbone
from backbone.config import BackboneConfig
from backbone.extraction.network import Network
from backbone.extraction.reading import read_all
from backbone.extraction.request import MAX_PIXELS, DtypeName, Pool, Request
from backbone.extraction.stream import Extracted, computed
from backbone.features import Backbone


class FeatureExtractor:
    """The callable class for ``ray.data.Dataset.map_batches``: an actor loads the network once.

    It adds a column a level, and the column ``note``, empty where all went well. A row that has no features says why
    there and has NaN in its vectors, or None where maps are kept.

    Args:
        model: A backbone, or what ``build_backbone`` takes.
        column: What holds the images: arrays (H, W, 3) of uint8 in RGB, as ``read_images(mode="RGB")`` gives, whole
            files, as ``read_binary_files`` gives, or paths.
        pool: ``avg`` and ``gem`` give vectors (N, C), ``none`` the maps, one array (C, H / stride, W / stride) a row.
        levels: Feature maps to keep; all by default.
        dtype: What to compute in.
        store: What the columns are in, ``float32`` or ``float16``; numpy has no bfloat16.
        batch: Images of one size at once, out of those of a call.
        device: Where to compute; by default a CUDA device if Ray gives one.
        shorter_side: Resize to this shorter side, in pixels.
        max_size: Longer side at most, in pixels.
        multiple_of: Resize both sides to the nearest multiple of this, in pixels.
        max_pixels: An image of more, after resizing, is not computed.

    Raises:
        ValueError: If a setting is wrong.
    """

    def __init__(
        self,
        model: Backbone | BackboneConfig | str,
        *,
        column: str = "image",
        pool: Pool = "avg",
        levels: Sequence[str] | None = None,
        dtype: DtypeName = "float32",
        store: Literal["float32", "float16"] = "float32",
        batch: int | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        shorter_side: int | None = None,
        max_size: int | None = None,
        multiple_of: int = 1,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        request = Request(
            pool=pool, levels=None if levels is None else tuple(levels), dtype=dtype, store=store, batch=batch,
            shorter_side=shorter_side, max_size=max_size, multiple_of=multiple_of, max_pixels=max_pixels,
        )  # fmt: skip
        if request.stored_dtype == "bfloat16":
            raise ValueError("store must be float32 or float16, for numpy has no bfloat16; got bfloat16")
        backbone = model if isinstance(model, Backbone) else build_backbone(model)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.column, self.request, self.network = column, request, Network(backbone, request, place)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """A batch with the images' column -> the same with a column a level and ``note``."""
        images = [image if isinstance(image, np.ndarray | bytes) else str(image) for image in batch[self.column]]
        results: list[Extracted | None] = [None] * len(images)
        for group in computed(read_all(enumerate(images), self.request, 0), self.network):
            for result in group:
                results[result.number] = result
        done = [result for result in results if result is not None]
        columns = {level: self._column(level, done) for level in self.network.levels}
        return {**batch, **columns, "note": np.array([result.note for result in done], dtype=object)}

    def _column(self, level: str, results: Sequence[Extracted]) -> NDArray[Any]:
        rows = [None if each.features is None else each.features[level].cpu().numpy() for each in results]
        if self.request.pool == "none":
            column = np.empty(len(rows), dtype=object)
            column[:] = rows
            return column
        nothing = np.full(self.network.specs[level].channels, np.nan, dtype=self.request.stored_dtype)
        return np.stack([nothing if row is None else row for row in rows])
