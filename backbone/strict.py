"""Settings objects: strict, frozen, read from YAML or Python, and every broken rule in one readable line."""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known word, or ``";"`` when none is near."""
    best = nearest(word, known)
    return ";" if best is None else f"; did you mean {best!r}?"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most like ``word``; None when none is near.

    Of several near words the one that starts most alike: for resnet52 resnet50, not resnet152.
    """
    near = difflib.get_close_matches(str(word), list(known), n=5)  # best first, and max keeps the first of equals
    return max(near, key=lambda each: len(os.path.commonprefix([str(word), each])), default=None)  # noqa: RUF071


def rule(text: str) -> WrapValidator:
    """State the rule in the field's own words, with the value received, in place of pydantic's message."""

    def check(value: object, validate: ValidatorFunctionWrapHandler) -> object:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(f"{text}, got {value!r}") from None

    return WrapValidator(check)


class SettingsError(ValidationError):
    """A broken rule of a settings object: pydantic's error, printed as one line for each rule and nothing else."""

    @classmethod
    def of(cls, error: ValidationError) -> Self:
        """Return ``error`` as one of this kind, its details kept."""
        details = [
            InitErrorDetails(
                type=PydanticCustomError(detail["type"], "{text}", {"text": _text(detail["type"], detail["msg"])}),
                loc=detail["loc"],
                input=detail["input"],
            )
            for detail in error.errors(include_url=False, include_context=False)
        ]
        return cls.from_exception_data(error.title, details)

    def __str__(self) -> str:
        return "\n".join(explain(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self.title, [(d["type"], d["msg"], d["loc"]) for d in self.errors()])


def _rebuilt(title: str, details: Iterable[tuple[str, str, tuple[int | str, ...]]]) -> SettingsError:
    """Make the error again in another process, where the input that was wrong may not follow."""
    return SettingsError.from_exception_data(
        title,
        [
            InitErrorDetails(type=PydanticCustomError(kind, "{text}", {"text": text}), loc=loc, input=None)
            for kind, text, loc in details
        ],
    )


def explain(error: ValidationError) -> list[str]:
    """Return one readable line per broken rule: the key, the rule, the value received and the remedy."""
    lines = []
    for detail in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in detail["loc"])
        lines.append(f"{key} {_text(detail['type'], detail['msg'])}".strip())
    return lines


def _text(kind: str, message: str) -> str:
    fixed = {
        "missing": "is required; give it a value",
        "frozen_instance": "cannot be changed, its object is frozen; make another with the new value",
    }
    return fixed.get(kind, re.sub("^Value error, ", "", message))


class StrictModel(BaseModel):
    """A frozen settings object: unknown keys are errors, and no value is converted behind the user's back."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    def __init__(self, **keys: Any) -> None:  # noqa: ANN401
        try:
            super().__init__(**keys)
        except ValidationError as error:
            raise SettingsError.of(error) from None

    # pydantic's own mark of an __init__ that only validates: nested objects are then validated without calling it,
    # and the key in their errors is the whole path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: object) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise SettingsError.of(error) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:  # noqa: ANN401
        """Return the settings that a mapping holds; raises a ``SettingsError``."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise SettingsError.of(error) from None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: object) -> object:
        if isinstance(data, dict):
            other = cls.mistaken_for(data)
            if other:
                raise ValueError(other)
            unknown = [key for key in data if key not in cls.model_fields]
            if unknown:
                hints = [f"unknown key {key!r}{did_you_mean(key, cls.model_fields)}" for key in unknown]
                raise ValueError(f"{' '.join(hints)} known keys: {', '.join(cls.model_fields)}")
        return data

    @classmethod
    def mistaken_for(cls, data: dict[Any, Any]) -> str | None:
        """Return what to do with keys that are plainly of another kind of settings; None where they are not."""
        return None

    def replaced(self, keys: dict[str, Any]) -> Self:
        """Return these settings with some keys changed, all rules checked anew; raises a ``SettingsError``."""
        said = {key: getattr(self, key) for key in self.model_fields_set}
        return type(self).model_validate({**said, **keys})


Config = TypeVar("Config", bound=StrictModel)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win in silence; here the second one is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            problem = ""
            if not isinstance(key_node, yaml.ScalarNode):
                problem = f"a key must be a word, got a {key_node.id}"
            elif key_node.value in seen:
                problem = f"key {key_node.value!r} is given twice"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike[str], schema: type[Config]) -> Config:
    """Read a YAML file into a checked configuration of class ``schema``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML or breaks a rule; names file, key, rule and remedy.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"config must be an existing YAML file, got {os.fspath(path)!r}; check the path")
    content = Path(path).read_bytes()
    try:
        data = yaml.load(content, Loader=_UniqueKeyLoader)
    except Exception as error:  # PyYAML lets through whatever int() or date() raises
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must be a mapping of keys such as `name: resnet50`, got {type(data).__name__}")
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {line}" for line in explain(error))) from None
