"""MADE (Germain et al., arXiv 1502.03509): masked linear layers, one logistic a dimension, and ordinary sampling.

x_t = mean_t(x_<t) + exp(logscale_t(x_<t)) u_t with u_t logistic noise: the sampling experiment of Song et al.
(arXiv 2002.03629, section 5.3), with its sizes: two hidden layers of 512 rectified units, dimensions in natural order.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from digits import dequantised, digits, photograph_patches
from torch import Tensor, nn
from training import fit
from weights import pretrained


class MaskedLinear(nn.Linear):
    """y = (weight * mask) x + bias, with a fixed mask (outputs, inputs) of zeros and ones."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs)."""
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """(B, D) -> (B, 2 D), means then log scales; the two of dimension t depend on dimensions before t only.

    Hidden unit i of H may see dimensions below its degree, 1 + i (D - 1) // H, so degrees rise with i.
    """

    def __init__(self, features: int = 784, hidden: int = 512) -> None:
        super().__init__()
        self.features = features
        self.degrees = 1 + torch.arange(hidden) * (features - 1) // hidden
        inputs = torch.arange(1, features + 1)
        outputs = torch.arange(features).repeat(2)
        self.net = nn.Sequential(
            MaskedLinear((self.degrees[:, None] >= inputs).float()),
            nn.ReLU(),
            MaskedLinear((self.degrees[:, None] >= self.degrees).float()),
            nn.ReLU(),
            MaskedLinear((outputs[:, None] >= self.degrees).float()),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The parameters of every dimension's logistic."""
        y: Tensor = self.net(x)
        return y


@torch.no_grad()
def sample(model: MADE, n: int) -> Tensor:
    """Draw (n, D), dimension by dimension, one run of the whole network a dimension."""
    device = next(model.parameters()).device
    x = torch.zeros(n, model.features, device=device)
    for t in range(model.features):
        mean, logscale = model(x).chunk(2, -1)
        x[:, t] = mean[:, t] + logscale[:, t].exp() * torch.rand(n, device=device).logit()
    return x


@torch.no_grad()
def sample_cached(model: MADE, n: int) -> Tensor:
    """The same draw by hand: every hidden unit is computed once, at the step where its last input is known.

    Equal to `sample` from the same seed up to rounding: its sums are shorter, so they round otherwise.
    """
    first, second, last = (layer for layer in model.net if isinstance(layer, MaskedLinear))
    w1, w2, w3 = (layer.weight * layer.mask for layer in (first, second, last))
    last_bias = last.bias.view(2, -1)
    pairs = w3.view(2, model.features, -1)
    done = torch.searchsorted(model.degrees, torch.arange(model.features), right=True).tolist()
    x = torch.zeros(n, model.features, device=w1.device)
    h1, h2 = x.new_zeros(n, w1.shape[0]), x.new_zeros(n, w2.shape[0])
    start = 0
    for t, stop in enumerate(done):
        if stop > start:
            h1[:, start:stop] = F.linear(x[:, :t], w1[start:stop, :t], first.bias[start:stop]).relu()
            h2[:, start:stop] = F.linear(h1[:, :stop], w2[start:stop, :stop], second.bias[start:stop]).relu()
            start = stop
        mean, logscale = F.linear(h2[:, :stop], pairs[:, t, :stop], last_bias[:, t]).unbind(-1)
        x[:, t] = mean + logscale.exp() * torch.rand(n, device=x.device).logit()
    return x


def negative_log_likelihood(model: MADE, x: Tensor) -> Tensor:
    """Mean nats per dimension of (B, D) under the logistics."""
    mean, logscale = model(x).chunk(2, -1)
    z = (x - mean) * torch.exp(-logscale)
    mean_loss: Tensor = (z + logscale + 2 * F.softplus(-z)).mean()
    return mean_loss


def train(
    model: MADE, images: Tensor, levels: int, *, steps: int = 800, batch: int = 100, seed: int = 0
) -> list[float]:
    """Train on rows (N, D) in [0, 1] of so many grey levels, with fresh noise in every batch; the losses."""

    def loss(x: Tensor) -> Tensor:
        return negative_log_likelihood(model, dequantised(x, levels))

    return fit(model, loss, images, steps=steps, batch=batch, rate=1e-3, seed=seed)


def train_digits(model: MADE) -> list[float]:
    """Train on the digits at 28x28, whose scans have 17 grey levels."""
    return train(model, digits().flatten(1), 17)


def train_patches(model: MADE) -> list[float]:
    """Train on 32x32x3 photograph patches, pixel by pixel, red before green before blue."""
    return train(model, photograph_patches(4000).permute(0, 2, 3, 1).flatten(1), 256, steps=400)


def untrained(features: int) -> MADE:
    """The network as it is before training, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MADE(features)


def untrained_digits() -> MADE:
    """The network for 28x28 digits before training."""
    return untrained(784)


def digits_model() -> MADE:
    """The trained network of the digits, D = 784."""
    return pretrained("made_784", untrained(784), train_digits)


def patches_model() -> MADE:
    """The trained network of the photograph patches, D = 3072; its first use trains it."""
    return pretrained("made_3072", untrained(3072), train_patches)


def main() -> None:
    """Draw samples ordinarily, compiled, and with the hand-written cache; print the times."""
    from compare import compare, timed

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--data", choices=("digits", "patches"), default="digits")
    arguments = parser.parse_args()
    model = digits_model() if arguments.data == "digits" else patches_model()
    compare(f"MADE, D = {model.features}, batch {arguments.batch}", sample, model, arguments.batch)
    seconds, _ = timed(sample_cached, model, arguments.batch)
    print(f"hand-written cache of hidden units: {seconds:.3f} s")


if __name__ == "__main__":
    main()
