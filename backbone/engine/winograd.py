"""3x3 convolutions in float32 on the CPU with a quarter of the multiplications (arXiv:1509.09308, F(4x4, 3x3)).

A direct fp32 convolution runs at the speed of the machine's matrix products, so only fewer products make it faster.
Each 4x4 tile of the output comes from a 6x6 tile of the input: both are transformed, 36 matrix products over channels
take the place of 144, and the result is transformed back. The 36 products are one grouped 1x1 convolution.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.engine.kernels import Geometry, conv_bias_act, has_onednn, pack

_TILE = 4  # output pixels per tile and direction
_SPAN = 6  # input pixels per tile and direction
_POINTS = (0.0, 0.6, -0.6, 1.5, -1.5)  # and infinity: half the rounding error of the usual 0, 1, -1, 2, -2
_MIN_CHANNELS = 128  # below, the transforms cost more than the products save
_MIN_TILES = 8
_BAND_BYTES = 12 * 2**20  # of transformed tiles at a time, so that they stay in the cache


@functools.cache
def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Cook-Toom: the matrices for input (6, 6), kernel (6, 3) and output (4, 6), in double precision on the CPU."""

    def powers(count: int) -> Tensor:
        rows = [[point**power for power in range(count)] for point in _POINTS]
        return torch.tensor([*rows, [0.0] * (count - 1) + [1.0]], dtype=torch.float64, device="cpu")

    for_input = torch.linalg.inv(powers(_SPAN)).T
    size = 2 ** torch.round(torch.log2(for_input.abs().amax(1, keepdim=True)))  # powers of two: exact
    return for_input / size, powers(3) * size, powers(_TILE).T


def suits(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution gains by it: float32 on the CPU, 3x3, stride 1, many channels, an image of some size."""
    return (
        x.dtype == torch.float32
        and weight.shape[2:] == (3, 3)
        and min(weight.shape[:2]) >= _MIN_CHANNELS
        and geometry == Geometry((1, 1), (1, 1), (1, 1), 1)
        and x.shape[0] * (x.shape[2] // _TILE) * (x.shape[3] // _TILE) >= _MIN_TILES
        and has_onednn(x)
    )


class WinogradConv:
    """``relu(conv(x, weight) + bias)`` for 3x3 convolutions with stride 1 and padding 1.

    Args:
        weight: (C_out, C_in, 3, 3).
        bias: (C_out,).
        x: An input of the shape to come; others are correct, but slow.
    """

    def __init__(self, weight: Tensor, bias: Tensor, x: Tensor) -> None:
        self.out_channels, in_channels = weight.shape[:2]
        for_input, for_kernel, for_output = _transforms()
        self.for_input, self.for_output = (torch.kron(t, t).float() for t in (for_input, for_output))
        one = torch.linalg.pinv(for_output).sum(1)  # transforms back to 1 everywhere: the bias enters before
        transformed = torch.einsum("ik,ockl,jl->ijoc", for_kernel, weight.double(), for_kernel)
        transformed = transformed.reshape(-1, in_channels, 1, 1).float()
        self.geometry = Geometry((1, 1), (0, 0), (1, 1), _SPAN * _SPAN)
        self.bias = (torch.outer(one, one).reshape(-1, 1) * bias.double()).reshape(-1).float()
        rows, columns = self._rows_at_a_time(x), -(-x.shape[3] // _TILE)
        self.weight = pack(transformed, self.geometry, x.new_empty(len(x), _SPAN * _SPAN * in_channels, rows, columns))

    def __call__(self, x: Tensor, *, relu: bool) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H, W), channels_last."""
        batch, _, height, width = x.shape
        band = self._rows_at_a_time(x)
        rows, columns = -(-height // (_TILE * band)) * band, -(-width // _TILE)
        x = F.pad(x, (1, _TILE * columns + 1 - width, 1, _TILE * rows + 1 - height))
        x = x.permute(0, 2, 3, 1).contiguous()  # (N, 4 rows + 2, 4 columns + 2, C)
        out = x.new_empty(batch, rows, _TILE, columns, _TILE, self.out_channels)
        for row in range(0, rows, band):
            tiles = self._tiles(x[:, _TILE * row :], band, columns)
            part = out[:, row : row + band]
            _ = torch.clamp_min(tiles, 0, out=part) if relu else part.copy_(tiles)  # ReLU and layout in one pass
        out = out.view(batch, rows * _TILE, columns * _TILE, self.out_channels)[:, :height, :width]
        return out.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def _tiles(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """The first rows of padded (N, H, W, C_in) -> output tiles (N, rows, 4, columns, 4, C_out)."""
        batch, channels = x.shape[0], x.shape[3]
        image, row, pixel, _ = x.stride()
        overlapping = x.as_strided(
            (batch, rows, columns, _SPAN, _SPAN, channels),
            (image, _TILE * row, _TILE * pixel, row, pixel, 1),
            x.storage_offset(),
        )
        tiles = batch * rows * columns
        tile = torch.bmm(self.for_input.expand(tiles, -1, -1), overlapping.reshape(tiles, _SPAN * _SPAN, channels))
        tile = tile.view(batch, rows, columns, -1).permute(0, 3, 1, 2)  # channels_last
        tile = conv_bias_act(tile, self.weight, self.bias, self.geometry, relu=False)
        tile = tile.permute(0, 2, 3, 1).reshape(tiles, _SPAN * _SPAN, self.out_channels)
        tile = torch.bmm(self.for_output.expand(tiles, -1, -1), tile)
        return tile.view(batch, rows, columns, _TILE, _TILE, self.out_channels).transpose(2, 3)

    def _rows_at_a_time(self, x: Tensor) -> int:
        """How many rows of tiles are transformed at a time: bands of equal height, the last one padded."""
        batch, channels, height, width = x.shape
        rows, columns = -(-height // _TILE), -(-width // _TILE)
        row_bytes = batch * columns * _SPAN * _SPAN * max(channels, self.out_channels) * x.element_size()
        bands = -(-rows * row_bytes // _BAND_BYTES)
        return -(-rows // min(bands, rows))
