"""The keys of the recipes as a page: what tests/test_docs.py compares docs/keys.md with.

python tests/config_keys.py > docs/keys.md
"""

from backbone.config import BackboneConfig, StrictModel
from backbone.recipe import DetectorConfig, PyramidConfig, TrainConfig

SECTIONS: dict[str, tuple[type[StrictModel], str]] = {
    "A backbone": (BackboneConfig, "In a file of its own, below `backbone` in a detector's, and in `build_backbone`."),
    "A detector": (DetectorConfig, "In a recipe's file, and in `build_detector`."),
    "A pyramid": (PyramidConfig, "Below `pyramid` in a detector's."),
    "Training": (TrainConfig, "Below `train` in a detector's; for `backbone train`."),
}


def page() -> str:
    """Return docs/keys.md."""
    lines = [
        "# Keys of the recipes",
        "",
        "Every key, its default and what it does. Unknown keys are errors. Generated from the configs themselves.",
    ]
    for title, (config, where) in SECTIONS.items():
        lines += ["", f"## {title}", "", where, "", "| key | default | |", "|---|---|---|"]
        for name, field in config.model_fields.items():
            default = _default(field.get_default(call_default_factory=True), field.is_required())
            description = (field.description or "").replace("|", "/").replace("<", "&lt;")
            lines.append(f"| `{name}` | {default} | {description} |")
    return "\n".join(lines)


def _default(value: object, is_required: bool) -> str:
    """Return a default as YAML says it."""
    if is_required:
        return "required"
    if isinstance(value, StrictModel):
        return "as below"
    plain = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return f"`{plain[value]}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


if __name__ == "__main__":
    print(page())
