"""Sampling from PixelCNN++ with hand-written caches, in the manner of Ramachandran et al. (arXiv 1704.06001).

Every convolution keeps its input. A pixel at row i then needs only row i of each layer, at a level of half the height row
i // 2, and there only where i is even: an odd row reads what the even row above it left. The vertical stream u knows
nothing of row i's pixels and runs once a row. The horizontal stream ul runs for each pixel, either for the whole row
(the row cache) or for the pixel's own column alone (the pixel cache, whose lower levels need an even column).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from pixelcnnpp import GatedResnet, Level, PixelCNNpp, ShiftedConv, ShiftedDeconv, concat_elu, draw
from torch import Tensor, nn


@dataclass(frozen=True)
class Strip:
    """Columns first .. last - 1 of one row, at the resolution of one level."""

    row: int
    first: int
    last: int

    def levels(self) -> list[Strip | None]:
        """The strip at full, half and quarter resolution; None where nothing of that level becomes known here."""
        strips: list[Strip | None] = [self]
        for k in (1, 2):
            due = self.row % (1 << k) == 0 and (self.last - self.first > 1 or self.first % (1 << k) == 0)
            strips.append(Strip(self.row >> k, self.first >> k, ((self.last - 1) >> k) + 1) if due else None)
        return strips


def read(source: Tensor, at: Strip) -> Tensor:
    """The strip of (B, C, H, W), as (B, C, columns)."""
    return source[:, :, at.row, at.first : at.last]


class Stream:
    """One of the two streams while an image is drawn: all outputs of its layers, filled strip by strip.

    `up` are the outputs on the way up, in order, and `down` those of the gated layers on the way down.
    """

    def __init__(self, model: PixelCNNpp, name: str, vertical: Stream | None, shape: tuple[int, int, int]) -> None:
        self.vertical = vertical
        self.inputs: dict[ShiftedConv, Tensor] = {}
        self.ways = [[self.gated(level, name) for level in way] for way in (model.up, model.down)]
        self.shrink: nn.ModuleList = getattr(model, f"{name}_shrink")
        self.grow: nn.ModuleList = getattr(model, f"{name}_grow")
        batch, height, width = shape
        blank = next(model.parameters()).new_zeros(batch, model.settings.filters, height, width)
        self.up = [blank[:, :, :: 1 << k, :: 1 << k].clone() for k in range(3) for _ in range(1 + len(self.ways[0][k]))]
        for way, sizes in zip(self.ways, ((1, 2, 4), (4, 2, 1)), strict=True):
            for layers, size in zip(way, sizes, strict=True):
                for layer in layers:
                    for conv in (layer.first, layer.second):
                        kept = concat_elu(blank[:, :, ::size, ::size])
                        self.inputs[conv] = F.pad(kept, (conv.left, conv.right, conv.top, 0))
        self.down = [blank[:, :, :: 4 >> k, :: 4 >> k].clone() for k in range(3) for _ in self.ways[1][k]]

    @staticmethod
    def gated(level: nn.Module, name: str) -> list[GatedResnet]:
        """The level's gated layers of the stream called `name`."""
        assert isinstance(level, Level)
        return [layer for layer in getattr(level, name) if isinstance(layer, GatedResnet)]

    def run(self, x: Tensor, at: Strip) -> Tensor:
        """Fill the strip of every layer from the first layer's strip, (B, F, columns); returns the last layer's."""
        strips = at.levels()
        index = 0
        for k, layers in enumerate(self.ways[0]):
            strip = strips[k]
            if strip is None:
                break
            if k > 0:
                x = self.shrunk(self.shrink[k - 1], self.up[index - 1], strip)
            self.keep(self.up[index], x, strip)
            for layer in layers:
                index += 1
                skip = None if self.vertical is None else read(self.vertical.up[index], strip)
                x = self.resnet(layer, x, skip, strip)
                self.keep(self.up[index], x, strip)
            index += 1
        taken, made = len(self.up) - 1, 0
        for k, layers in enumerate(self.ways[1]):
            strip = strips[2 - k]
            if strip is not None:
                x = read(self.up[taken], strip) if k == 0 else self.grown(self.grow[k - 1], self.down[made - 1], strip)
                for offset, layer in enumerate(layers):
                    skip = read(self.up[taken - 1 - offset], strip)
                    if self.vertical is not None:
                        skip = torch.cat([read(self.vertical.down[made + offset], strip), skip], dim=1)
                    x = self.resnet(layer, x, skip, strip)
                    self.keep(self.down[made + offset], x, strip)
            taken -= len(layers)
            made += len(layers)
        return x

    @staticmethod
    def keep(target: Tensor, x: Tensor, at: Strip) -> None:
        """Write the strip of (B, C, H, W)."""
        target[:, :, at.row, at.first : at.last] = x

    def convolved(self, layer: ShiftedConv, x: Tensor, at: Strip) -> Tensor:
        """The strip of a convolution's output, from the same strip of its input, whose earlier strips it kept."""
        seen = self.inputs[layer]
        seen[:, :, at.row + layer.top, layer.left + at.first : layer.left + at.last] = x
        rows = seen[:, :, at.row : at.row + layer.top + 1, at.first : at.last + layer.left + layer.right]
        y: Tensor = layer.conv(rows)
        return y.squeeze(2)

    def resnet(self, layer: GatedResnet, x: Tensor, skip: Tensor | None, at: Strip) -> Tensor:
        """The strip of a gated layer's output."""
        y = self.convolved(layer.first, concat_elu(x.unsqueeze(2)).squeeze(2), at)
        if skip is not None:
            assert layer.skip is not None
            y = y + layer.skip(concat_elu(skip.unsqueeze(2))).squeeze(2)
        a, b = self.convolved(layer.second, concat_elu(y.unsqueeze(2)).squeeze(2), at).chunk(2, dim=1)
        return x + a * torch.sigmoid(b)

    @staticmethod
    def shrunk(layer: nn.Module, source: Tensor, at: Strip) -> Tensor:
        """The strip of a convolution with stride 2 over `source`, the level above."""
        assert isinstance(layer, ShiftedConv)
        rows = source[:, :, max(2 * at.row - layer.top, 0) : 2 * at.row + 1]
        rows = F.pad(rows, (layer.left, layer.right, layer.top + 1 - rows.shape[2], 0))
        y: Tensor = layer.conv(rows[:, :, :, 2 * at.first : 2 * at.last - 1 + layer.left + layer.right])
        return y.squeeze(2)

    @staticmethod
    def grown(layer: nn.Module, source: Tensor, at: Strip) -> Tensor:
        """The strip of a transposed convolution over `source`, the level below."""
        assert isinstance(layer, ShiftedDeconv)
        # A centred one also hears from the neighbouring columns.
        first, last = (0, source.shape[3]) if layer.centred else (at.first // 2, (at.last + 1) // 2)
        y: Tensor = layer(source[:, :, at.row // 2 : at.row // 2 + 1, first:last])
        return y[:, :, at.row % 2, at.first - 2 * first : at.last - 2 * first]


class CachedRun:
    """Both streams over one batch of images `x`, (B, C + 1, H, W) with its channel of ones, which grows pixel by pixel."""

    def __init__(self, model: PixelCNNpp, x: Tensor) -> None:
        self.model, self.x = model, x
        shape = (x.shape[0], x.shape[2], x.shape[3])
        self.u = Stream(model, "u", None, shape)
        self.ul = Stream(model, "ul", self.u, shape)

    def started(self, layer: ShiftedConv, at: Strip) -> Tensor:
        """The strip of a first convolution over the image."""
        rows = self.x[:, :, max(at.row - layer.top, 0) : at.row + 1]
        rows = F.pad(rows, (layer.left, layer.right, layer.top + 1 - rows.shape[2], 0))
        y: Tensor = layer.conv(rows[:, :, :, at.first : at.last + layer.left + layer.right])
        return y.squeeze(2)

    def vertical(self, i: int) -> None:
        """Run stream u for row i, from the rows above it."""
        width = self.x.shape[3]
        self.above = u = self.x.new_zeros(self.x.shape[0], self.model.settings.filters, width)
        if i > 0:
            before = Strip(i - 1, 0, width)
            u, self.above = self.started(self.model.u_start, before), self.started(self.model.above_start, before)
        self.u.run(u, Strip(i, 0, width))

    def horizontal(self, at: Strip) -> Tensor:
        """Run stream ul for the strip, after `vertical` of its row: mixture parameters (B, P, columns)."""
        ul = self.above[:, :, at.first : at.last]
        if at.first > 0:
            ul = ul + self.started(self.model.left_start, Strip(at.row, at.first - 1, at.last - 1))
        elif at.last > 1:
            left = self.started(self.model.left_start, Strip(at.row, 0, at.last - 1))
            ul = ul + F.pad(left, (1, 0))
        y: Tensor = self.model.head(F.elu(self.ul.run(ul, at)).unsqueeze(2))
        return y.squeeze(2)


@torch.no_grad()
def sample_cached(model: PixelCNNpp, n: int, size: int = 28, *, pixelwise: bool = False) -> Tensor:
    """Draw (n, C, size, size) as `pixelcnnpp.sample` does from the same seed, equal up to rounding.

    Args:
        model: the network.
        n: how many images.
        size: their height and width.
        pixelwise: use the pixel cache, not the row cache.
    """
    channels = model.settings.channels
    x = torch.zeros(n, channels, size, size, device=next(model.parameters()).device)
    run = CachedRun(model, F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0))
    for i in range(size):
        run.vertical(i)
        for j in range(size):
            if pixelwise:
                parameters = run.horizontal(Strip(i, j, j + 1))[:, :, 0]
            else:
                parameters = run.horizontal(Strip(i, 0, size))[:, :, j]
            run.x[:, :channels, i, j] = draw(parameters, channels)
    return run.x[:, :channels]
