"""Pre-trained stems for images of other channels."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from backbone.features import Preprocessing

RGB_CHANNELS = 3


def stem_mapping(file_channels: int, channels: int, chosen: Sequence[int | None] | None) -> list[list[int]] | None:
    """Return, for each input channel of the network, the pre-trained channels it stands for; None to change nothing.

    Raises:
        ValueError: If ``chosen`` does not fit either side, or nothing is chosen and the weights are not RGB's.
    """
    if chosen is not None:
        unknown = [index for index in chosen if index is not None and not 0 <= index < file_channels]
        if len(chosen) != channels or unknown:
            raise ValueError(
                f"stem_channels_from must name, for each of the {channels} input channels, one of the weights' "
                f"channels 0 to {file_channels - 1} or null, got {list(chosen)}"
            )
        return [[] if index is None else [index] for index in chosen]
    if file_channels == channels or file_channels != RGB_CHANNELS:
        return None
    return [[0, 1, 2]] if channels == 1 else [[index % RGB_CHANNELS] for index in range(channels)]


def adapt_stem(weight: Tensor, mapping: list[list[int]], *, even: bool) -> Tensor:
    """Return a stem weight (C_out, len(mapping), kh, kw) made of the channels of ``weight``.

    Args:
        weight: (C_out, C_file, kh, kw).
        mapping: For each input channel the pre-trained channels whose weights it sums.
        even: Whether all copies are scaled alike, so that their sum stays that of RGB; else each pre-trained channel
            is divided among its own copies.
    """
    copies = [sum(index in group for group in mapping) for index in range(weight.shape[1])]
    channels = []
    for group in mapping:
        parts = [weight[:, index] * (weight.shape[1] / sum(copies) if even else 1 / copies[index]) for index in group]
        channels.append(torch.stack(parts).sum(0) if parts else torch.zeros_like(weight[:, 0]))
    return torch.stack(channels, dim=1).to(weight.dtype)


def for_channels(preprocessing: Preprocessing, channels: int) -> Preprocessing:
    """Return mean and std for weights of so many channels: what is known of fewer is repeated in turn.

    A file of 13 bands says nothing of their statistics where its format assumes RGB's.
    """
    if len(preprocessing.mean) == channels:
        return preprocessing
    mean, std = preprocessing.mean, preprocessing.std
    turns = range(channels)
    return replace(
        preprocessing,
        mean=tuple(mean[turn % len(mean)] for turn in turns),
        std=tuple(std[turn % len(std)] for turn in turns),
        channel_order="rgb" if channels > RGB_CHANNELS else preprocessing.channel_order,
    )


def adapt_preprocessing(preprocessing: Preprocessing, mapping: list[list[int]]) -> Preprocessing:
    """Return the mean and std of the new input channels: those of the channels they stand for, averaged.

    ``preprocessing`` has one value for each channel that ``mapping`` names, see ``for_channels``.
    """

    def averaged(values: tuple[float, ...], absent: float) -> tuple[float, ...]:
        return tuple(sum(values[i] for i in group) / len(group) if group else absent for group in mapping)

    order = preprocessing.channel_order
    if len(preprocessing.mean) == RGB_CHANNELS and [group[:1] for group in mapping[:RGB_CHANNELS]] == [[2], [1], [0]]:
        order = "rgb" if order == "bgr" else "bgr"
    low = preprocessing.value_range[0]
    return replace(
        preprocessing,
        mean=averaged(preprocessing.mean, low),
        std=averaged(preprocessing.std, 1.0),
        channel_order=order,
    )
