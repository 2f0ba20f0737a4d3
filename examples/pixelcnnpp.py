"""PixelCNN++ (Salimans et al., arXiv 1701.05517): the network, its likelihood, and ordinary sampling in raster order.

Two streams of gated residual layers run over the image at three resolutions. The vertical stream u at row i sees the rows
above i; the horizontal stream ul at pixel (i, j) sees the rows above and the pixels left of j. A pixel's distribution is a
mixture of logistics whose means depend on the pixel's earlier channels (R -> G -> B).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from digits import signed, strokes
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from training import fit
from weights import pretrained


@dataclass(frozen=True)
class Settings:
    """Sizes of the network; the defaults are the paper's for CIFAR-10.

    `channels` of the image, `filters` per stream, `resnets` per level and direction, `mixtures` of logistics; `weight_norm`
    splits each kernel into a direction and a length, as the paper does.
    """

    channels: int = 3
    filters: int = 160
    resnets: int = 5
    mixtures: int = 10
    dropout: float = 0.5
    weight_norm: bool = True


PAPER_CIFAR = Settings()
PAPER_MNIST = Settings(channels=1, filters=40)
SMALL = Settings(channels=1, filters=16, resnets=1, dropout=0.0, weight_norm=False)


def concat_elu(x: Tensor) -> Tensor:
    """The elu of x and of -x, stacked along the channels: (B, C, H, W) -> (B, 2 C, H, W)."""
    return F.elu(torch.cat([x, -x], dim=1))


def shifted_down(x: Tensor) -> Tensor:
    """Row i becomes row i - 1; row 0 becomes zero."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


def shifted_right(x: Tensor) -> Tensor:
    """Column j becomes column j - 1; column 0 becomes zero."""
    return F.pad(x[:, :, :, :-1], (1, 0, 0, 0))


def normalised(module: nn.Module, on: bool) -> nn.Module:
    """The module with weight normalisation where it is asked for."""
    return weight_norm(module) if on else module


class ShiftedConv(nn.Module):
    """A convolution that sees no row below and, if `right` is 0, no column right of the output's own.

    (B, C, H, W) -> (B, C', H / stride, W / stride), with the input padded by kernel[0] - 1 rows above and kernel[1] - 1
    columns, all on the left, or half of them (`centred`) on each side.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        *,
        stride: int = 1,
        centred: bool,
        norm: bool,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.right = (kernel[1] - 1) // 2 if centred else 0
        self.left = kernel[1] - 1 - self.right
        self.top = kernel[0] - 1
        self.stride = stride
        conv = nn.Conv2d(inputs, outputs, kernel, stride)
        with torch.no_grad():
            conv.weight.mul_(gain)
        self.conv = normalised(conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the padded input."""
        y: Tensor = self.conv(F.pad(x, (self.left, self.right, self.top, 0)))
        return y


class ShiftedDeconv(nn.Module):
    """A transposed convolution that doubles both sizes, (B, C, H, W) -> (B, C', 2 H, 2 W).

    Input (i, j) reaches the rows 2 i and 2 i + 1 of the columns 2 j and 2 j + 1, and of 2 j - 1 if `centred` (kernel 2x3).
    """

    def __init__(self, inputs: int, outputs: int, *, centred: bool, norm: bool) -> None:
        super().__init__()
        self.centred = centred
        kernel = (2, 3) if centred else (2, 2)
        self.conv = normalised(nn.ConvTranspose2d(inputs, outputs, kernel, 2, output_padding=(0, int(centred))), norm)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, and cut the columns that reach over the edges."""
        y: Tensor = self.conv(x)
        return y[:, :, :, 1:-1] if self.centred else y


class GatedResnet(nn.Module):
    """x + a sigmoid(b), with (a, b) two convolutions of x, the first one joined by a 1x1 convolution of `skip`."""

    def __init__(self, settings: Settings, kernel: tuple[int, int], skip: int, *, centred: bool) -> None:
        super().__init__()
        width, norm = settings.filters, settings.weight_norm
        self.first = ShiftedConv(2 * width, width, kernel, centred=centred, norm=norm)
        self.skip = normalised(nn.Conv2d(2 * skip * width, width, 1), norm) if skip else None
        self.dropout = nn.Dropout2d(settings.dropout)
        # A residual branch that starts small trains without the paper's data-dependent initialisation.
        self.second = ShiftedConv(2 * width, 2 * width, kernel, centred=centred, norm=norm, gain=0.1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, F, H, W) and (B, skip F, H, W) -> (B, F, H, W)."""
        y = self.first(concat_elu(x))
        if self.skip is not None:
            assert skip is not None
            y = y + self.skip(concat_elu(skip))
        a, b = self.second(self.dropout(concat_elu(y))).chunk(2, dim=1)
        gated: Tensor = a * torch.sigmoid(b)
        return x + gated


class Level(nn.Module):
    """The gated layers of one resolution, up or down, of both streams; `skips` widths come from the upward way."""

    def __init__(self, settings: Settings, layers: int, *, down: bool) -> None:
        super().__init__()
        u_skip, ul_skip = (1, 2) if down else (0, 1)
        self.u = nn.ModuleList(GatedResnet(settings, (2, 3), u_skip, centred=True) for _ in range(layers))
        self.ul = nn.ModuleList(GatedResnet(settings, (2, 2), ul_skip, centred=False) for _ in range(layers))


class PixelCNNpp(nn.Module):
    """Images (B, C, H, W) in [-1, 1], H and W multiples of 4 -> mixture parameters (B, P, H, W).

    The parameters at (i, j) depend on pixels before (i, j) in raster order only. P = mixtures (1 + 2 C + C (C - 1) / 2).
    """

    def __init__(self, settings: Settings = PAPER_CIFAR) -> None:
        super().__init__()
        self.settings = settings
        s, width, inputs = settings, settings.filters, settings.channels + 1
        self.u_start = ShiftedConv(inputs, width, (2, 3), centred=True, norm=s.weight_norm)
        self.above_start = ShiftedConv(inputs, width, (1, 3), centred=True, norm=s.weight_norm)
        self.left_start = ShiftedConv(inputs, width, (2, 1), centred=False, norm=s.weight_norm)
        self.up = nn.ModuleList(Level(s, s.resnets, down=False) for _ in range(3))
        self.down = nn.ModuleList(Level(s, s.resnets + (k > 0), down=True) for k in range(3))
        self.u_shrink = nn.ModuleList(
            ShiftedConv(width, width, (2, 3), stride=2, centred=True, norm=s.weight_norm) for _ in range(2)
        )
        self.ul_shrink = nn.ModuleList(
            ShiftedConv(width, width, (2, 2), stride=2, centred=False, norm=s.weight_norm) for _ in range(2)
        )
        self.u_grow = nn.ModuleList(ShiftedDeconv(width, width, centred=True, norm=s.weight_norm) for _ in range(2))
        self.ul_grow = nn.ModuleList(ShiftedDeconv(width, width, centred=False, norm=s.weight_norm) for _ in range(2))
        c = settings.channels
        self.head = normalised(nn.Conv2d(width, settings.mixtures * (1 + 2 * c + c * (c - 1) // 2), 1), s.weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        """The mixture parameters of every pixel."""
        x = F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)  # a channel of ones tells the image from its padding
        u = shifted_down(self.u_start(x))
        ul = shifted_down(self.above_start(x)) + shifted_right(self.left_start(x))
        us, uls = [u], [ul]
        for k, level in enumerate(self.up):
            assert isinstance(level, Level)
            if k > 0:
                u, ul = self.u_shrink[k - 1](u), self.ul_shrink[k - 1](ul)
                us.append(u)
                uls.append(ul)
            for u_layer, ul_layer in zip(level.u, level.ul, strict=True):
                u = u_layer(u)
                ul = ul_layer(ul, u)
                us.append(u)
                uls.append(ul)
        u, ul = us.pop(), uls.pop()
        for k, level in enumerate(self.down):
            assert isinstance(level, Level)
            if k > 0:
                u, ul = self.u_grow[k - 1](u), self.ul_grow[k - 1](ul)
            for u_layer, ul_layer in zip(level.u, level.ul, strict=True):
                u = u_layer(u, us.pop())
                ul = ul_layer(ul, torch.cat([u, uls.pop()], dim=1))
        parameters: Tensor = self.head(F.elu(ul))
        return parameters


def split(parameters: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mixture parameters (B, P, ...) -> logits (B, K, ...), means and log scales (B, C, K, ...), and coefficients.

    By the coefficients, (B, C (C - 1) / 2, K, ...), a later channel's mean follows the earlier channels.
    """
    pairs = channels * (channels - 1) // 2
    mixtures = parameters.shape[1] // (1 + 2 * channels + pairs)
    parts = parameters.view(parameters.shape[0], 1 + 2 * channels + pairs, mixtures, *parameters.shape[2:])
    means, scales = parts[:, 1 : 1 + channels], parts[:, 1 + channels : 1 + 2 * channels]
    return parts[:, 0], means, scales.clamp(min=-7.0), parts[:, 1 + 2 * channels :].tanh()


def negative_log_likelihood(model: PixelCNNpp, x: Tensor) -> Tensor:
    """Mean bits per dimension of images (B, C, H, W) on 256 levels in [-1, 1]: each level's mass under the mixture."""
    channels = x.shape[1]
    logits, means, scales, coefficients = split(model(x), channels)
    shifts, pair = [means[:, :1]], 0
    for c in range(1, channels):
        mean = means[:, c]
        for earlier in range(c):
            mean = mean + coefficients[:, pair] * x[:, earlier].unsqueeze(1)
            pair += 1
        shifts.append(mean.unsqueeze(1))
    centred, narrow = x.unsqueeze(2) - torch.cat(shifts, dim=1), torch.exp(-scales)
    high, low, middle = narrow * (centred + 1 / 255), narrow * (centred - 1 / 255), narrow * centred
    mass = torch.sigmoid(high) - torch.sigmoid(low)
    # Where the interval's mass underflows, its density times its width stands in.
    density = middle - scales - 2 * F.softplus(middle) - torch.log(torch.tensor(127.5, device=x.device))
    inside = torch.where(mass > 1e-5, mass.clamp(min=1e-12).log(), density)
    level = x.unsqueeze(2)
    log_mass = torch.where(level < -0.999, F.logsigmoid(high), torch.where(level > 0.999, F.logsigmoid(-low), inside))
    per_pixel = torch.logsumexp(log_mass.sum(1) + F.log_softmax(logits, dim=1), dim=1)
    return -per_pixel.mean() / (channels * torch.log(torch.tensor(2.0, device=x.device)))


def draw(parameters: Tensor, channels: int) -> Tensor:
    """One pixel (B, C) from its mixture parameters (B, P): Gumbel-max picks the logistic, its inverse CDF the value."""
    logits, means, scales, coefficients = split(parameters, channels)
    gumbel = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-5, 1 - 1e-5)))
    chosen = (logits + gumbel).argmax(dim=1, keepdim=True).unsqueeze(1)
    mean = means.gather(2, chosen.expand(-1, channels, -1)).squeeze(2)
    scale = scales.gather(2, chosen.expand(-1, channels, -1)).squeeze(2)
    uniform = torch.rand_like(mean).clamp(1e-5, 1 - 1e-5)
    value = mean + scale.exp() * (uniform.log() - (1 - uniform).log())
    if channels == 1:
        return value.clamp(-1.0, 1.0)
    follow = coefficients.gather(2, chosen.expand(-1, coefficients.shape[1], -1)).squeeze(2)
    colours: list[Tensor] = []
    for c in range(channels):
        colour = value[:, c]
        for earlier in range(c):
            colour = colour + follow[:, c * (c - 1) // 2 + earlier] * colours[earlier]
        colours.append(colour.clamp(-1.0, 1.0))
    return torch.stack(colours, dim=1)


@torch.no_grad()
def sample(model: PixelCNNpp, n: int, size: int = 28) -> Tensor:
    """Draw (n, C, size, size) in raster order, one run of the whole network a pixel."""
    channels = model.settings.channels
    x = torch.zeros(n, channels, size, size, device=next(model.parameters()).device)
    for i in range(size):
        for j in range(size):
            x[:, :, i, j] = draw(model(x)[:, :, i, j], channels)
    return x


@torch.no_grad()
def inpaint(model: PixelCNNpp, image: Tensor, count: int) -> Tensor:
    """Draw the last `count` pixels of images (n, C, H, W) anew, in raster order, given those before them."""
    n, channels, height, width = image.shape
    x = image.clone()
    x.view(n, channels, -1)[:, :, height * width - count :] = 0
    for k in range(height * width - count, height * width):
        i, j = divmod(k, width)
        x[:, :, i, j] = draw(model(x)[:, :, i, j], channels)
    return x


def full_model(settings: Settings = PAPER_CIFAR) -> PixelCNNpp:
    """The network at the paper's size, untrained, the same in every process, as it is when it samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PixelCNNpp(settings).eval()


def train(model: PixelCNNpp, steps: int = 700, batch: int = 16, seed: int = 0) -> list[float]:
    """Train on the digits' strokes at 28x28; the losses, in bits per dimension."""
    images = signed(strokes()).unsqueeze(1).to(next(model.parameters()).device)
    return fit(
        model,
        lambda x: negative_log_likelihood(model, x),
        images,
        steps=steps,
        batch=batch,
        rate=3e-3,
        seed=seed,
    )


def untrained_digits() -> PixelCNNpp:
    """The small network as it is before training, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PixelCNNpp(SMALL)


def digits_model() -> PixelCNNpp:
    """The small network, trained on the digits."""
    return pretrained("pixelcnnpp_small", untrained_digits(), train)


def main() -> None:
    """Draw digits ordinarily, compiled, and with both hand-written caches; print the times."""
    from compare import compare, timed
    from pixelcnnpp_cached import sample_cached

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    model = digits_model()
    compare(f"PixelCNN++, 28x28 digits, batch {arguments.batch}", sample, model, arguments.batch)
    for pixelwise in (False, True):
        seconds, _ = timed(sample_cached, model, arguments.batch, pixelwise=pixelwise)
        print(f"hand-written {'pixel' if pixelwise else 'row'} cache: {seconds:.3f} s")


if __name__ == "__main__":
    main()
