"""Which of timm's architectures a file's tensors are, told from their names and shapes alone."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from backbone.features import Preprocessing
from backbone.weights.formats.timm import PREFIX, create, named_architecture
from backbone.weights.metadata import Metadata
from backbone.weights.reading import Checkpoint

RECIPE_NAME: Final = "recipe.backbone.name"
"""Where our own training checkpoints have the network's registered name."""

MAX_BUILT: Final = 100  # architectures, a tenth of a second each
_WRAPPERS: Final = re.compile(r"(model|state_dict|state_dict_ema|ema|module|_orig_mod|backbone|body|detector)\.")
_OURS: Final = re.compile(rf"({_WRAPPERS.pattern})*network\.")


def named_in(checkpoint: Checkpoint) -> str | None:
    """Return the architecture that the file or a config.json beside it names; None without one."""
    if named := named_architecture(checkpoint):
        return PREFIX + named
    if recipe := checkpoint.notes.get(RECIPE_NAME):
        return recipe
    try:
        architecture = json.loads(Path(checkpoint.source).with_name("config.json").read_bytes())["architecture"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return PREFIX + architecture if isinstance(architecture, str) else None


def prefix_of(tensors: Mapping[str, Tensor]) -> str:
    """Return what training scripts and our own classes put before the keys of the network in ``tensors``."""
    ours = next((found[0] for key in tensors if (found := _OURS.match(key))), None)
    if ours is not None:
        return ours
    prefix = ""
    while word := _WRAPPERS.match(next(iter(tensors), "").removeprefix(prefix)):
        if not all(key.startswith(prefix + word[0]) for key in tensors):
            break
        prefix += word[0]
    return prefix


def networks(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of timm's networks with these tensors, but for a classifier of any size; none without timm.

    A backbone of ours (``network.`` before its names) may lack what lies behind C5. Networks of one shape in several of
    timm's modules are told from the smallest of these modules.
    """
    prefix = prefix_of(tensors)
    inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    shapes = {key: tuple(value.shape) for key, value in inside.items()}
    if not any(key.endswith("running_mean") for key in shapes):
        return []  # transformers are too many, and too alike
    built = 0
    for models in _modules_with(shapes):
        built += len(models)
        if built > MAX_BUILT:
            break
        lacking = {name: _lacking(name, shapes, may_lack=prefix.endswith("network.")) for name in models}
        fewest = min((count for count in lacking.values() if count is not None), default=None)
        if fewest is not None:
            return [PREFIX + name for name, count in lacking.items() if count == fewest]
    return []


def conventions(names: list[str]) -> list[Metadata]:
    """Return for each of timm's networks what its first weights expect of an image."""
    try:
        from timm.models import get_pretrained_cfg
    except ImportError:
        return []
    found = []
    for name in names:
        published: Any = get_pretrained_cfg(name.removeprefix(PREFIX))
        if published is not None and published.has_weights:
            pixels = Preprocessing(published.mean, published.std, interpolation=published.interpolation)
            found.append(Metadata(f"timm's weights of {name}", preprocessing=pixels))
    return found


def _modules_with(keys: Iterable[str]) -> list[list[str]]:
    """Return the models of each of timm's modules whose source names all parts of these keys, the fewest first.

    What lies within timm's common blocks and layers may be named there.
    """
    try:
        import timm
    except ImportError:
        return []
    paths = [re.findall(r"[a-z_]\w*?(?=\d*\.)", key) for key in keys]
    outermost, inside = {path[0] for path in paths if path}, {word for path in paths for word in path[1:]}
    root = Path(timm.__file__).parent
    common = _source(*root.glob("models/_*.py"), *root.glob("layers/*.py"))
    particular = outermost | {word for word in inside if not _names(common, word)}
    found = []
    for module in timm.list_modules():
        text = _source(root / "models" / f"{module}.py")
        if text and all(_names(text, word) for word in particular):
            found.append(timm.list_models(module=module))
    return sorted(found, key=len)


def _source(*files: Path) -> str:
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def _names(source: str, word: str) -> bool:
    """Whether the source gives anything that name: ``self.word``, ``"word"``, or either with a number behind."""
    return re.search(rf"(self\.|['\"]){re.escape(word)}(\d|\{{|\b)", source) is not None


def _lacking(name: str, shapes: Mapping[str, tuple[int, ...]], *, may_lack: bool) -> int | None:
    """Return how many of the network's tensors are not in the file; None if it is another network's."""
    try:
        network = create(name)
    except Exception:  # of more than a thousand some need what is not installed
        return None
    classifier = network.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    own = {key: tuple(value.shape) for key, value in network.state_dict().items() if not key.startswith(heads)}
    rest = {key: shape for key, shape in shapes.items() if not key.startswith(heads)}
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    if any(own.get(key) != shape for key, shape in rest.items()):
        return None
    missing = own.keys() - rest.keys() - counters
    return len(missing) if may_lack or not missing else None
