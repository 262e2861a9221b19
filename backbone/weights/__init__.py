"""Checkpoints of any library into a backbone, and out again: strict, safe, explained, and all or nothing.

source (sources.py) -> tensors (reading.py) -> our names (recognise.py, one file per format) -> checks -> copy
"""

import logging
import os
from collections.abc import Sequence

from torch import Tensor

from backbone.features import Backbone, Preprocessing
from backbone.weights.convert import TARGETS, convert_weights
from backbone.weights.fit import require_fit
from backbone.weights.inspect import Inspection, inspect_weights
from backbone.weights.metadata import Metadata, cross_check, set_eps, warn_of_bgr
from backbone.weights.reading import Checkpoint
from backbone.weights.recognise import Recognised, recognise
from backbone.weights.report import LoadReport
from backbone.weights.sources import is_location, open_source
from backbone.weights.stem import adapt_preprocessing, adapt_stem, stem_mapping

__all__ = [
    "TARGETS",
    "Inspection",
    "LoadReport",
    "Metadata",
    "convert_weights",
    "inspect_weights",
    "load_weights",
]

STEM = "conv1.weight"
CLASSIFIER = "fc."

logger = logging.getLogger(__name__)


def load_weights(
    backbone: Backbone,
    source: str | os.PathLike[str],
    *,
    name: str,
    stem_channels_from: Sequence[int | None] | None = None,
) -> LoadReport:
    """Load weights of any known format into ``backbone``, and note the preprocessing they expect.

    Names are translated to the network's own; then every parameter and buffer must be there with its shape, and
    nothing else may be, what the report explains apart (``fc.*`` without a classifier, stages beyond
    ``out_features``, a detector's head). On an error ``backbone`` keeps its old bytes.

    Args:
        backbone: The network to fill.
        source: A torchvision weights name (``IMAGENET1K_V2``, ``RetinaNet_ResNet50_FPN_Weights.COCO_V1``), a path, an
            http, https or file URL ending in ``#sha256=<digest>``, ``timm/<model>`` or ``hf://org/repo/file``.
        name: Registered name of the network, under which torchvision knows its weights.
        stem_channels_from: For each input channel the pre-trained channel it copies, None for a zero; by default
            RGB weights are summed for one input channel, repeated and rescaled for more than three.

    Returns:
        What happened to every key; also logged as ``backbone.weights`` at level INFO.

    Raises:
        FileNotFoundError: If the path does not exist.
        OSError: If the download fails.
        ImportError: If the source needs a library that is not installed.
        ValueError: If the source is neither, the file is damaged or carries code, keys or shapes differ, a weight is
            not finite, or the weights are known to belong to another network.
    """
    named = None if is_location(source) else backbone.named_weights(str(source))
    if named is None:
        checkpoint = open_source(source, name)
    else:
        facts = Metadata(f"the network's library publishes it as {source}", known=True, preprocessing=named[1])
        checkpoint = Checkpoint(str(source), named[0], facts=facts)
    own = backbone.state_dict()
    found = recognise(checkpoint, lambda key: key in own or key.startswith(backbone.unbuilt_prefixes))
    preprocessing = found.metadata.preprocessing or Preprocessing()
    state, adapted, reshaped = dict(found.state), list(found.additions), []
    if stem_channels_from is not None and STEM not in own:
        raise ValueError(f"stem_channels_from adapts a ResNet's {STEM}, and {name} has none; remove the key")
    if STEM in own and STEM in state and state[STEM].ndim == own[STEM].ndim:
        channels = state[STEM].shape[1]
        mapping = stem_mapping(channels, own[STEM].shape[1], stem_channels_from)
        if mapping is not None:
            state[STEM] = adapt_stem(state[STEM], mapping, even=stem_channels_from is None)
            preprocessing = adapt_preprocessing(preprocessing, mapping)
            reshaped = [STEM] if len(mapping) != channels else []
            adapted.append(f"{STEM}: input channels stand for pre-trained channels {mapping}")
    dropped = _drop_unbuilt(state, backbone, found)
    require_fit(state, own, found.unexplained, checkpoint.source)
    cross_check(backbone, found.metadata, checkpoint.source)
    if stem_channels_from is None:
        warn_of_bgr(preprocessing, backbone.preprocessing, checkpoint.source)
    backbone.load_state_dict(state, strict=False)  # all but the counters of batches is known to be there
    adapted += set_eps(backbone, found.metadata.eps)
    backbone.preprocessing = preprocessing
    report = LoadReport(
        source=checkpoint.source,
        format=found.format.name if found.format else name,
        why=found.why,
        prefix=found.prefix,
        loaded=list(state),
        missing=[key for key in own if key not in state],
        dropped=dropped,
        reshaped=reshaped,
        adapted=adapted,
        metadata=found.metadata,
    )
    logger.info("%s", report)
    return report


def _drop_unbuilt(state: dict[str, Tensor], backbone: Backbone, found: Recognised) -> dict[str, list[str]]:
    """Take out of ``state`` the parts that the network was built without; return all that is dropped, by reason."""
    dropped = {reason: list(keys) for reason, keys in found.dropped.items()}
    for key in [key for key in state if key.startswith(backbone.unbuilt_prefixes)]:
        reason = "classifier" if key.startswith(CLASSIFIER) else "stages that are not built"
        dropped.setdefault(reason, []).append(key)
        del state[key]
    return dropped
