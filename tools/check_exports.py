"""Fill the table of docs/deployment.md: each model in each runtime, compared with PyTorch, ticked or its reason.

python tools/check_exports.py --table docs/deployment.md

Each model is noted in docs/exports.json as soon as it is done, so that a run that was stopped goes on; what this
revision of the exporting code has measured is not measured again. ``--only`` takes some models, ``--list`` says which.
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from backbone.export import checking, runners
from backbone.export.network import Network, Outputs, understand
from backbone.export.request import SUFFIXES, Request, Target
from backbone.export.tracing import Traced, trace
from backbone.export.writing import write_draft

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("<!-- exports: begin -->", "<!-- exports: end -->")
TARGETS = ("onnx", "openvino")
DECIDING = (
    *(
        f"export/{name}.py"
        for name in ("affine", "folding", "network", "onnx", "openvino", "padding", "resizing", "tracing")
    ),
    "export/detection/*.py",
    "providers/**/*.py",
)


def main() -> None:
    """Run the cells that are asked for and that the results do not hold for this revision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", action="append", help="runtime; may be given again (default: onnx and openvino)")
    parser.add_argument("--only", default=".*", help="pattern of models, which must match the whole name")
    parser.add_argument("--list", action="store_true", help="list the models and what is still to do, and run nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "exports.json", help="results, kept and added to")
    parser.add_argument("--table", type=Path, help="page to write the table into")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[str, dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    now = revision()
    rows = dict(models())
    for name, make in rows.items():
        known = {target for target, cell in results.get(name, {}).items() if cell["revision"] == now}
        missing = [target for target in arguments.to or TARGETS if target not in known]
        if arguments.list:
            print(f"{name}: {', '.join(missing) or 'done'}")
        elif missing and re.fullmatch(arguments.only, name):
            row = run_row(make, missing)
            stamp = {"revision": now, "torch": torch.__version__, "date": date.today().isoformat()}
            results.setdefault(name, {}).update({target: cell | stamp for target, cell in row.items()})
            print(f"{name}: {'; '.join(f'{target} {say(cell)}' for target, cell in row.items())}", flush=True)
            ordered = {row: results[row] for row in rows if row in results}
            arguments.out.write_text(json.dumps(ordered, indent=1) + "\n")
    if arguments.table:
        write_table(arguments.table, {name: results.get(name, {}) for name in rows})


def revision() -> str:
    """Return a digest of the code that decides what a file of float32 computes."""
    digest = hashlib.sha256()
    for pattern in DECIDING:
        for file in sorted((ROOT / "backbone").glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield every row of the table: backbones, the same with a pyramid, detectors and segmenters."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "export")]
    import cells  # type: ignore[import-not-found, unused-ignore]

    for name, make in cells.MODELS.items():
        yield name, make
        yield f"{name} + pyramid", lambda make=make: cells.on_pyramid(make())  # type: ignore[misc]
    for name in cells.DETECTORS:
        yield name, lambda name=name: cells.detector(name)  # type: ignore[misc]


def run_row(make: Callable[[], nn.Module], targets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Export one model for each runtime, traced once; return its largest differences or the reason why not."""
    torch.manual_seed(0)
    row: dict[str, dict[str, Any]] = {}
    try:
        network, traced, expected, model = prepare(make())
    except ValueError as error:
        return {target: {"reason": str(error)} for target in targets}
    for target in targets:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"model{SUFFIXES[cast(Target, target)]}"
            try:
                request = Request(path, cast(Target, target))
                write_draft(network, traced, request, {"backbone_version": "", **model}, path, ())
                found = checking.compare(network, expected, runners.load(path, request.to), "float32")
                row[target] = {**found._asdict(), "cases": [case[:3] for case, _ in expected]}
            except (ValueError, ImportError, OSError) as error:
                row[target] = {"reason": str(error)}
    return row


def prepare(model: nn.Module) -> tuple[Network, Traced, list[tuple[checking.Case, Outputs]], dict[str, str]]:
    """Do what every runtime needs: trace the model, and compute what PyTorch gives."""
    request = Request(Path("model.onnx"), "onnx")
    network = understand(model, request)
    traced = trace(network, request)
    expected = checking.expectations(network, checking.cases(network, traced, request))
    return network, traced, expected, {"backbone_outputs": json.dumps(network.outputs)}


def write_table(page: Path, results: dict[str, dict[str, Any]]) -> None:
    """Put the table between its marks in ``page``."""
    targets = list(dict.fromkeys([*TARGETS, *(target for row in results.values() for target in row)]))
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
