"""Checkpoints of any library into a backbone, and out again: strict, safe, explained, and all or nothing.

source (sources.py) -> tensors (reading.py) -> our names (recognise.py, one file per format) -> checks -> copy
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum

from torch import Tensor, nn

from backbone.config import WeightsSource
from backbone.features import Backbone, Preprocessing
from backbone.providers.input_channels import adapt_preprocessing, adapt_stem, for_channels, stem_mapping
from backbone.weights.convert import TARGETS, convert_weights
from backbone.weights.fit import require_fit
from backbone.weights.inspect import Inspection, inspect_weights
from backbone.weights.metadata import Metadata, cross_check, set_eps, warn_of_bgr
from backbone.weights.reading import Checkpoint, flatten
from backbone.weights.recognise import STEMS, Recognised, network_name, recognise, under_timms_names, wrapper
from backbone.weights.renaming import describe_misfit, fitted, own_prefix, renamed
from backbone.weights.report import LoadReport
from backbone.weights.schemes import State
from backbone.weights.sources import is_location, open_source
from backbone.weights.within import backbone_within

__all__ = [
    "TARGETS",
    "Inspection",
    "LoadReport",
    "Metadata",
    "convert_weights",
    "inspect_weights",
    "load_weights",
]

CLASSIFIER = "fc."
DEFAULT_EPS = 1e-5  # of batch norms in every library here

logger = logging.getLogger(__name__)


def load_weights(
    model: nn.Module,
    source: WeightsSource,
    *,
    name: str | None = None,
    stem_channels_from: Sequence[int | None] | None = None,
    rename: Callable[[str], str | None] | None = None,
) -> LoadReport:
    """Load weights of any known format into the backbone of ``model``, and note the preprocessing they expect.

    Names are translated to the network's own. Then every parameter and buffer must be there with its shape, and nothing
    else may be. What the report explains is no error: ``fc.*`` without a classifier, stages beyond ``out_features``, a
    detector's head. On an error ``model`` keeps its old bytes.

    Args:
        model: The backbone to fill, or a pyramid or detector, of any library, that holds one of this package.
        source: A torchvision weights name (``IMAGENET1K_V2``, ``RetinaNet_ResNet50_FPN_Weights.COCO_V1``), a member of
            its enums, a path or a state dict. Or an address: an http, https or file URL ending in
            ``#sha256=<digest>``, ``timm/<model>``, ``hf://org/repo/file``. Or ``package://<package>/<path>`` for a file
            that an installed Python package carries.
        name: Registered name of the network, under which torchvision knows its weights; by default the one that the
            backbone was built by.
        stem_channels_from: For each input channel the pre-trained channel it copies, None for a zero; by default
            RGB weights are summed for one input channel, repeated and rescaled for more than three.
        rename: For names that are no known library's: gets each key, as ``backbone inspect`` lists it, and returns its
            name in this network or in a known format; None drops the key.

    Returns:
        What happened to every key; also logged as ``backbone.weights`` at level INFO.

    Raises:
        FileNotFoundError: If the path does not exist.
        OSError: If the download fails.
        ImportError: If the source needs a library that is not installed.
        ValueError: If the source is neither, the file is damaged or carries code, or keys or shapes differ. Also if a
            weight is not finite, the weights are known to belong to another network, or ``model`` holds no backbone.
    """
    backbone = backbone_within(model)
    if name is None:
        name = _name(backbone)
    checkpoint = _open(backbone, source, name, rename)
    own = backbone.state_dict()
    found = recognise(checkpoint, lambda key: key in own or key.startswith(backbone.unbuilt_prefixes))
    state, preprocessing, adapted = _fit_stem(found, own, stem_channels_from, name)
    dropped = _drop_unbuilt(state, backbone, found)
    initial = _keep_unpublished(state, own, backbone)
    require_fit(state, own, found.unexplained, checkpoint.source)
    cross_check(backbone, found.metadata, checkpoint.source)
    if stem_channels_from is None:
        warn_of_bgr(preprocessing, backbone.preprocessing, checkpoint.source)
    backbone.load_state_dict(state, strict=False)  # all but the counters of batches is known to be there
    eps = DEFAULT_EPS if found.metadata.eps is None and found.format else found.metadata.eps
    adapted += set_eps(backbone, eps)
    backbone.preprocessing = preprocessing
    origin = checkpoint.origin
    report = LoadReport(
        source=checkpoint.source,
        format=origin.format if origin else found.format.name if found.format else name,
        why=origin.why if origin else found.why,
        prefix=origin.prefix if origin else found.prefix,
        loaded=[key for key in state if key not in initial],
        missing=[key for key in own if key not in state],
        dropped={**(origin.dropped if origin else {}), **dropped},
        reshaped=[key for key in state if key in found.state and state[key].shape != found.state[key].shape],
        adapted=[*found.additions, *adapted],
        metadata=found.metadata,
        initial=initial,
    )
    logger.info("%s", report)
    return report


def _name(backbone: Backbone) -> str:
    """Return the registered name of ``backbone``, as far as its config or its shapes tell."""
    if backbone.config is not None:
        return backbone.config.name
    return network_name(backbone.state_dict()) or type(backbone).__name__


def _open(
    backbone: Backbone, source: WeightsSource, name: str, rename: Callable[[str], str | None] | None
) -> Checkpoint:
    """Read ``source``; what is no location may be a name that the network's own library knows."""
    if isinstance(source, Mapping):
        checkpoint = flatten(source if isinstance(source, dict) else dict(source), "the state dict")
    else:
        text = _text(source)
        named = None if is_location(text) else backbone.named_weights(text)
        if named is not None:
            facts = Metadata(f"the network's library publishes it as {text}", known=True, preprocessing=named[1])
            return Checkpoint(text, named[0], facts=facts)
        checkpoint = open_source(text, name)
    checkpoint = under_timms_names(renamed(checkpoint, rename))
    prefix = own_prefix(checkpoint.tensors) or wrapper(checkpoint.tensors)
    inside = {k.removeprefix(prefix): value for k, value in checkpoint.tensors.items() if k.startswith(prefix)}
    try:
        adapted = backbone.adapt_weights(inside)
    except ValueError as error:
        raise ValueError(describe_misfit(checkpoint, inside, backbone, name, error)) from None
    if adapted is None:
        return checkpoint
    tensors = {key: value for key, value in checkpoint.tensors.items() if not key.startswith(prefix)}
    tensors |= {f"{prefix}{key}": value for key, value in adapted[0].items()}
    assumed = Metadata("the library's description of this network", preprocessing=adapted[1])
    return replace(checkpoint, tensors=tensors, facts=fitted(checkpoint.facts, adapted[1]) or assumed)


def _text(source: object) -> str:
    """Return a source that is no state dict as a string: a member of torchvision's enums by its full name."""
    if isinstance(source, Enum) and not isinstance(source, str):
        return f"{type(source).__name__}.{source.name}"
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    raise ValueError(
        f"weights must be a name, a path, an address, a member of torchvision's weights enums or a state dict, got "
        f"{type(source).__name__}; of a model give model.state_dict()"
    )


def _fit_stem(
    found: Recognised, own: Mapping[str, Tensor], chosen: Sequence[int | None] | None, name: str
) -> tuple[State, Preprocessing, list[str]]:
    """Return the tensors with the stem as the network's input channels need it, their pixels, and what was done."""
    preprocessing = found.metadata.preprocessing or Preprocessing()
    name_of_stem = next((key for key in STEMS if key in own), STEMS[0])
    stem, wanted = found.state.get(name_of_stem), own.get(name_of_stem)
    if chosen is not None and wanted is None:
        raise ValueError(f"stem_channels_from adapts a ResNet's {name_of_stem}, and {name} has none; remove the key")
    if stem is None or wanted is None or not stem.ndim == wanted.ndim == 4:  # noqa: PLR2004
        return dict(found.state), preprocessing, []
    preprocessing = for_channels(preprocessing, stem.shape[1])
    mapping = stem_mapping(stem.shape[1], wanted.shape[1], chosen)
    if mapping is None:
        return dict(found.state), preprocessing, []
    state = {**found.state, name_of_stem: adapt_stem(stem, mapping, even=chosen is None)}
    told = f"{name_of_stem}: input channels stand for pre-trained channels {mapping}"
    return state, adapt_preprocessing(preprocessing, mapping), [told]


def _keep_unpublished(state: State, own: Mapping[str, Tensor], backbone: Backbone) -> list[str]:
    """Add to ``state`` the present values of parts that published weights lack; return their names.

    A file that has any of a part must have all of it.
    """
    kept = []
    for prefix in backbone.unpublished_prefixes:
        if not any(key.startswith(prefix) for key in state):
            kept += [key for key in own if key.startswith(prefix)]
    state.update({key: own[key] for key in kept})
    return kept


def _drop_unbuilt(state: State, backbone: Backbone, found: Recognised) -> dict[str, list[str]]:
    """Take out of ``state`` the parts that the network was built without; return all that is dropped, by reason."""
    dropped = {reason: list(keys) for reason, keys in found.dropped.items()}
    for key in [key for key in state if key.startswith(backbone.unbuilt_prefixes)]:
        reason = "classifier" if key.startswith(CLASSIFIER) else "stages that are not built"
        dropped.setdefault(reason, []).append(key)
        del state[key]
    return dropped
