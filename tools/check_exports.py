"""Fill the table of docs/deployment.md: each model in each runtime, compared with PyTorch, ticked or its reason.

python tools/check_exports.py --to onnx --to openvino --out docs/exports.json --table docs/deployment.md
"""

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("<!-- exports: begin -->", "<!-- exports: end -->")
TARGETS = ("onnx", "openvino")


def main() -> None:
    """Run the cells that are asked for and that the results do not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", action="append", help="runtime; may be given again (default: onnx and openvino)")
    parser.add_argument("--only", default=".*", help="pattern of models")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "exports.json", help="results, kept and added to")
    parser.add_argument("--table", type=Path, help="page to write the table into")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[str, dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name, make in models():
        for target in arguments.to or TARGETS:
            if re.search(arguments.only, name) and target not in results.get(name, {}):
                results.setdefault(name, {})[target] = cell = run_cell(make, target)
                print(name, target, cell, flush=True)
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.table:
        write_table(arguments.table, results)


def models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield every row of the table: backbones, the same with a pyramid, detectors and segmenters."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "export")]
    import cells

    for name, make in cells.MODELS.items():
        yield name, make
        yield f"{name} + pyramid", lambda make=make: cells.on_pyramid(make())  # type: ignore[misc]
    for name in cells.DETECTORS:
        yield name, lambda name=name: cells.detector(name)  # type: ignore[misc]


def run_cell(make: Callable[[], nn.Module], target: str) -> dict[str, Any]:
    """Export one model for one runtime; return its largest differences or the reason why not."""
    from backbone.export import SUFFIXES, export_model

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = export_model(make(), Path(folder) / f"model{SUFFIXES[target]}", target)  # type: ignore[index, arg-type]
        except (ValueError, ImportError, OSError) as error:
            return {"reason": str(error)}
    return {**report.difference._asdict(), "cases": report.cases}


def write_table(page: Path, results: dict[str, dict[str, Any]]) -> None:
    """Put the table between its marks in ``page``."""
    targets = list(dict.fromkeys(target for row in results.values() for target in row))
    lines = [f"| model | {' | '.join(targets)} |", f"|---|{'---|' * len(targets)}"]
    for name, row in results.items():
        lines.append(f"| {name} | {' | '.join(say(row.get(target)) for target in targets)} |")
    text = page.read_text()
    before, rest = text.split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n" + "\n".join(lines) + f"\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def say(cell: dict[str, Any] | None) -> str:
    """Return a cell's text."""
    if cell is None:
        return "not run"
    if "reason" in cell:
        return cell["reason"].replace("|", "/")  # type: ignore[no-any-return]
    if cell["num_detections"]:
        return f"✓ {cell['num_detections']} found, {cell['boxes']:.0e} px, {cell['scores']:.0e}"
    return f"✓ {cell['features']:.0e}"


if __name__ == "__main__":
    main()
