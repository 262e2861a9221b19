"""Backbone names and their constructors: ours, the caller's, those of installed plugins and of whole libraries."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from types import ModuleType
from typing import Final, TypeAlias, TypeVar

from backbone.config import BackboneConfig, did_you_mean
from backbone.features import Backbone
from backbone.strict import nearest

ENTRY_POINT_GROUP: Final = "backbone.backbones"
"""A plugin package declares ``name = "package.module:constructor"`` under this group."""

BUILT_IN: Final = "built in"
_LIBRARIES: Final = {"timm": "backbone.providers.timm.provider"}
"""What comes before the slash in the names of a library's models -> the module that knows them, imported on demand."""

BackboneConstructor: TypeAlias = Callable[[BackboneConfig], Backbone]
Constructor = TypeVar("Constructor", bound=BackboneConstructor)

_constructors: dict[str, BackboneConstructor] = {}


class UnknownBackboneError(KeyError, ValueError):
    """A name that nothing is registered under: a failed look-up and, in a config, a wrong value."""

    __str__ = Exception.__str__  # KeyError's own would print the message in quotes


def register_backbone(name: str) -> Callable[[Constructor], Constructor]:
    """Return a decorator that registers a constructor under ``name``.

    The constructor takes a BackboneConfig and returns a Backbone with fresh weights, nothing frozen: weights are
    loaded and stages frozen by ``build_backbone``. It must honour every setting of the config or raise ValueError.

    Raises:
        ValueError: (from the decorator) if the name is taken.
    """

    def register(constructor: Constructor) -> Constructor:
        if name in _constructors:
            taken_by = getattr(_constructors[name], "__module__", "another module")
            raise ValueError(f"backbone {name!r} is already registered by {taken_by}; choose another name")
        _constructors[name] = constructor
        return constructor

    return register


def list_backbones(pattern: str = "*", *, provider: str | None = None) -> list[str]:
    """Return the known names that match a shell pattern such as ``resnet*``, sorted; plugins stay unimported.

    Args:
        pattern: What the names must match. A library's models, of which there are many, are listed only for a pattern
            that begins with the library, such as ``timm/convnext*``, or when it is the provider.
        provider: ``built in``, ``timm``, or the name of a plugin's package: list its backbones only, for a pattern with
            or without ``timm/``.

    Raises:
        ImportError: If the library is not installed.
        ValueError: If nobody is called ``provider``.
    """
    library = find_library(pattern if provider is None else f"{provider}/")
    if library is not None:
        patterns = [pattern, f"{provider}/{pattern}"]
        return sorted(name for name in library.names() if any(fnmatchcase(name, each) for each in patterns))
    providers = {name: origin(name).split(" (", maxsplit=1)[0] for name in {*_constructors, *_plugins()}}
    if provider is not None and provider not in providers.values():
        known = sorted({*providers.values(), *_LIBRARIES})
        raise ValueError(f"unknown provider {provider!r}{did_you_mean(provider, known)} known: {', '.join(known)}")
    return sorted(name for name, by in providers.items() if fnmatchcase(name, pattern) and provider in (None, by))


def origin(name: str) -> str:
    """Return who provides it: ``built in``, ``timm``, ``package (module:constructor)``, or a registering module."""
    if name in _constructors:
        module = getattr(_constructors[name], "__module__", "another module")
        return BUILT_IN if module.partition(".")[0] == __name__.partition(".")[0] else module
    if name in (plugins := _plugins()):
        return " and ".join(_origin(entry) for entry in plugins[name])
    return name.partition("/")[0]


def find_library(name: str) -> ModuleType | None:
    """Return the module that knows the models of the library before the slash in ``name``; None without a library.

    It has ``names()``, ``find_constructor(name)`` and ``measure(name)``.

    Raises:
        ImportError: If the library is not installed; names what to install.
    """
    library, slash, _ = name.partition("/")
    if not slash or library not in _LIBRARIES:
        return None
    try:
        return import_module(_LIBRARIES[library])
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ModuleNotFoundError(
            f"backbones named {library}/... need {library}, which is not installed: pip install 'backbone[{library}]'",
            name=library,
        ) from None


def find_constructor(name: str) -> BackboneConstructor:
    """Return the constructor registered under ``name``, importing the plugin that declares it if need be.

    Raises:
        UnknownBackboneError: If no such name is known; suggests the nearest and lists the others.
        ValueError: If two plugins declare the name, or its plugin yields no constructor.
        ImportError: If its plugin cannot be imported.
    """
    if name in _constructors:
        return _constructors[name]
    library = find_library(name)
    if library is not None:
        return library.find_constructor(name)  # type: ignore[no-any-return]
    declared = _plugins().get(name)
    if declared is None:
        raise UnknownBackboneError(f"unknown backbone {name!r}{_hint(name)} known: {', '.join(list_backbones())}")
    if len(declared) > 1:
        origins = " and ".join(_origin(entry) for entry in declared)
        raise ValueError(f"backbone {name!r} is declared by {origins}; uninstall one of them")
    entry = declared[0]
    try:
        loaded = entry.load()
    except Exception as error:
        raise ImportError(
            f"backbone {name!r} comes from {_origin(entry)}, which failed to import: {error!r}; repair or uninstall it"
        ) from error
    constructor = _constructors.get(name, loaded)  # a plugin may use our decorator instead of naming a callable
    if not callable(constructor):
        raise ValueError(
            f"backbone {name!r}: {_origin(entry)} must name a constructor, got {loaded!r}; "
            f'write {name} = "package.module:constructor" in its entry points'
        )
    return constructor  # type: ignore[no-any-return]


def is_ours(name: str) -> bool:
    """Whether the constructor of ``name`` is part of this package, for its own networks or those of a library."""
    return name.partition("/")[0] in _LIBRARIES or (name in _constructors and origin(name) == BUILT_IN)


def _hint(name: str) -> str:
    """Return what an unknown ``name`` was probably meant to be: the same of a library, or one that is like it."""
    if name.endswith((".yaml", ".yml")):
        return "; a recipe's file is read by load_config(path);"
    if name.lower() in list_backbones():
        return f"; did you mean {name.lower()!r}?"
    of_libraries: dict[str, str] = {}
    for library in _LIBRARIES:
        if find_spec(library) is not None:
            of_libraries |= {each.partition("/")[2]: each for each in list_backbones(provider=library)}
    without_tag = name.lower().partition(".")[0]
    same = of_libraries.get(without_tag)
    if same is not None:
        return f"; did you mean {same + name[len(without_tag) :]!r}?"
    near = nearest(name, list_backbones()) or of_libraries.get(nearest(name, of_libraries) or "")
    return f"; did you mean {near!r}?" if near else ";"


def _plugins() -> dict[str, list[EntryPoint]]:
    """Plugins' entry points by name, not imported. They come second: none can take over a registered name."""
    plugins: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        plugins.setdefault(entry.name, []).append(entry)
    return plugins


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name if entry.dist else 'an unknown package'} ({entry.value})"
