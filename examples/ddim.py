"""A small diffusion model of the digits and its deterministic sampler, DDIM (Song et al., arXiv 2010.02502, eq. 12)."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from digits import digits
from torch import Tensor, nn
from training import fit
from weights import pretrained


class Denoiser(nn.Module):
    """Noisy images (B, 1, H, W), H and W even, and times (B,) in 0 .. 999 -> the noise in them, (B, 1, H, W)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, -7, 16)), persistent=False)
        self.time = nn.Sequential(nn.Linear(32, 2 * width), nn.SiLU(), nn.Linear(2 * width, 3 * width))
        self.start = nn.Conv2d(1, width, 3, padding=1)
        self.shrink = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(2 * width, 2 * width, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.grow = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)
        self.end = nn.Conv2d(width, 1, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, 2 * width) for _ in self.middle)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Estimate the noise."""
        angles = t[:, None].to(x.dtype) * self.frequencies
        fine, coarse = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))[:, :, None, None].tensor_split(
            [self.start.out_channels], dim=1
        )
        high = F.silu(self.start(x) + fine)
        low = F.silu(self.shrink(high) + coarse)
        for norm, conv in zip(self.norms, self.middle, strict=True):
            low = low + F.silu(conv(norm(low)))
        noise: Tensor = self.end(F.silu(self.join(torch.cat([high, self.grow(low)], dim=1))))
        return noise


def signal_levels(device: torch.device | None = None) -> Tensor:
    """The part of the variance that is signal at times 0 .. 999, the cosine schedule of arXiv 2102.09672."""
    phase = (torch.arange(1000, device=device) / 1000 + 0.008) / 1.008 * torch.pi / 2
    return phase.cos().square().clamp(min=1e-4)


@torch.no_grad()
def sample(model: Denoiser, noise: Tensor, steps: int = 100) -> Tensor:
    """Images (B, 1, H, W) from noise of that shape, by so many deterministic steps.

    From level a of the signal to level b: x <- sqrt(b / a) x + (sqrt(1 - b) - sqrt(b (1 - a) / a)) estimate(x).
    """
    times = torch.linspace(999, 0, steps + 1).long()
    levels = signal_levels(noise.device)[times]
    now, after = levels[:-1], levels[1:]
    shrink = (after / now).sqrt()
    follow = (1 - after).sqrt() - shrink * (1 - now).sqrt()
    x = noise
    for k, time in enumerate(times[:-1].tolist()):
        t = torch.full((x.shape[0],), time, device=x.device)
        x = shrink[k] * x + follow[k] * model(x, t)
    return x


def denoising_error(model: Denoiser, x: Tensor) -> Tensor:
    """Mean squared error of the estimated noise, at random times, for images (B, 1, H, W) in [-1, 1]."""
    t = torch.randint(1000, (x.shape[0],), device=x.device)
    level = signal_levels(x.device)[t][:, None, None, None]
    noise = torch.randn_like(x)
    return F.mse_loss(model(level.sqrt() * x + (1 - level).sqrt() * noise, t), noise)


def train(model: Denoiser, steps: int = 1000, batch: int = 32, seed: int = 0, size: int = 28) -> list[float]:
    """Train on the digits; the losses."""
    images = (2 * digits(size) - 1).unsqueeze(1).to(model.frequencies.device)
    return fit(model, lambda x: denoising_error(model, x), images, steps=steps, batch=batch, rate=2e-3, seed=seed)


def untrained() -> Denoiser:
    """The network as it is before training, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser()


def digits_model() -> Denoiser:
    """The network trained on the digits at 28x28."""
    return pretrained("ddim", untrained(), train)


def small_digits_model() -> Denoiser:
    """The network trained on the digits at 8x8, whose Jacobian is small enough for Newton's method; trained at first use."""
    return pretrained("ddim_8", untrained(), lambda model: train(model, size=8))


def main() -> None:
    """Draw digits in 100 steps, ordinarily and compiled; print the times."""
    from compare import compare

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    noise = torch.randn(arguments.batch, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    compare(f"DDIM, 100 steps, batch {arguments.batch}", sample, digits_model(), noise)


if __name__ == "__main__":
    main()
