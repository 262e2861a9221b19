"""Files drawn at random around a valid one: reading them raises nothing but our ValueError."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="draws the files; pip install 'backbone[test]'")
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import base, config_of, outcome, write_images
from runs import IGNORED_WARNINGS

from backbone.training.coco.annotations import read_annotations

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def places(draw: st.DrawFn, content: object) -> list[Any]:
    """Draw a way into nested lists and dicts."""
    path: list[Any] = []
    while isinstance(content, dict | list) and content and (not path or draw(st.integers(0, 4))):
        key = draw(st.sampled_from(list(content) if isinstance(content, dict) else range(len(content))))
        path.append(key)
        content = content[key]
    return path


@st.composite
def odd_files(draw: st.DrawFn) -> tuple[str, Any]:
    """Draw a detector and a file that differs from a valid one in up to four places."""
    detector = draw(st.sampled_from(["retinanet", "mask_rcnn", "keypoint_rcnn", "fcn"]))
    content: Any = base(detector)
    for _ in range(draw(st.integers(1, 4))):
        *path, last = draw(places(content))
        target = content
        for key in path:
            target = target[key]
        target[last] = draw(JSON)
    return detector, content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("odd") / "data"
    write_images(data)
    return data


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(drawn=odd_files())
def test_reading_whatever_file_raises_nothing_but_our_value_error(drawn: tuple[str, Any], folder: Path) -> None:
    detector, content = drawn
    came = outcome(folder, content, detector)  # turns that error into a message; another one goes through
    assert came.get("items") or len(came["refused"]) > 10
    came.get("summary", "").encode()  # can be printed


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(text=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_bytes_are_refused_with_the_files_name(text: bytes, folder: Path) -> None:
    (folder / "annotations" / "train.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"train\.json: "):
        read_annotations(folder, "train", config_of("retinanet"))
