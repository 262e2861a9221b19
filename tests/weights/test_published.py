"""What can be downloaded, as each network's library states it."""

import pytest

from backbone import UnknownBackboneError, list_weights


def test_torchvisions_choice_comes_first_with_its_accuracy_and_size() -> None:
    first, second = list_weights("resnet50")
    assert (first.name, second.name) == ("IMAGENET1K_V2", "IMAGENET1K_V1")
    assert first.accuracy == pytest.approx(80.858)
    assert first.megabytes == pytest.approx(97.79, abs=1)
    assert first.url is not None
    assert first.url.startswith("https://")


def test_timms_tags_state_licence_and_place() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    weights = list_weights("timm/convnext_tiny")
    assert "in12k_ft_in1k" in [each.name for each in weights]
    assert all(each.licence and each.url for each in weights)


def test_a_network_nobody_publishes_weights_of_has_none() -> None:
    assert list_weights("resnet50d") == ()


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(UnknownBackboneError, match="did you mean 'resnet50'"):
        list_weights("resnet52")
