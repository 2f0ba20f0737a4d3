"""Autoregressive sampling: the ordinary loop, the compiled one, and the best that people write by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import fxjacobi
from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.bench.example_models import example
from fxjacobi.testing.assertions import assert_equal_bits
from fxjacobi.timing import interleaved, once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["MadeInpainting", "MadeSampling", "PixelCnnInpainting", "PixelCnnSampling", "TransformerSampling"]


def _row(
    case: str,
    settings: Settings,
    sample: Callable[..., torch.Tensor],
    by_hand: Callable[..., torch.Tensor] | None,
    args: tuple[Any, ...],
    rounds: int,
) -> Row:
    """Measure one case: equality on another seed than the recorded one, then the times, all in one run."""
    compiled = fxjacobi.compile(sample)

    def seeded(function: Callable[..., torch.Tensor], seed: int = 1) -> torch.Tensor:
        torch.manual_seed(settings.seed + seed)
        return function(*args)

    with torch.no_grad():
        _, first_s = once(lambda: seeded(compiled))
        assert_equal_bits(seeded(compiled, 2), seeded(sample, 2))
        runs = [lambda: seeded(sample), lambda: seeded(compiled)]
        if by_hand is not None:
            runs.append(lambda: seeded(by_hand))
        times = interleaved(runs, rounds=min(settings.rounds, rounds), warmup=0)
    steps = max((b.equations for b in compiled.plan.blocks), default=0)
    # Loops beside the sampling one (what is carried out of it) run in order; those that swept have prefixes.
    sweeps = max((block.sweeps for block in compiled.report.blocks if block.prefixes), default=compiled.report.sweeps)
    values: dict[str, float | int | str | bool] = {
        "steps": steps,
        "sweeps": sweeps,
        "ordinary_s": times[0],
        "first_call_s": first_s,
        "solved_s": times[1],
        "ratio": times[0] / times[1],
        "equal": True,
    }
    active = [samples for block in compiled.report.blocks for samples in block.active]
    if active:
        values["samples_a_sweep"] = sum(active) / len(active)
    if by_hand is not None:
        values |= {"by_hand_s": times[2], "ratio_to_hand": times[2] / times[1]}
    return Row(case, values)


class MadeSampling(Benchmark):
    """MADE 2x512 on 784 and 3072 dimensions; by hand: every hidden unit is computed once."""

    name = "made"
    summary = "MADE 2x512, a logistic a dimension, trained on digits and photograph patches"

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each size and batch."""
        made = example("made")
        for name, batches, rounds in (("digits_model", (100, 1), 3), ("patches_model", (100,), 1)):
            model = getattr(made, name)()
            for batch in batches:
                case = f"D={model.features}, batch {batch}"
                yield _row(case, settings, made.sample, made.sample_cached, (model, batch), rounds)


@torch.no_grad()
def _inpaint(model: Any, images: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Draw the unknown dimensions of images (n, D) given the known ones, one run of the whole network a dimension."""
    x = torch.where(known, images, torch.zeros(()))
    for t in range(images.shape[1]):
        mean, logscale = model(x).chunk(2, -1)
        drawn = mean[:, t] + logscale[:, t].exp() * torch.rand(len(x)).logit()
        x[:, t] = torch.where(known[:, t], images[:, t], drawn)
    return x


class MadeInpainting(Benchmark):
    """Images of which most lack a little and a few lack all: those that are final are left out of later sweeps."""

    name = "made_inpainting"
    summary = "MADE 2x512 on digits, 100 images: 90 lack their last 28 pixels, 10 lack all"

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield the row."""
        made = example("made")
        model = made.digits_model()
        torch.manual_seed(settings.seed)
        images = made.sample(model, 100)
        known = torch.ones(100, model.features, dtype=torch.bool)
        known[:, -28:] = False
        known[::10] = False
        yield _row("batch 100", settings, _inpaint, None, (model, images, known), rounds=3)


class PixelCnnInpainting(Benchmark):
    """PixelCNN++ at the paper's size for CIFAR-10 (53.7 million parameters), untrained, drawing the end of an image."""

    name = "pixelcnnpp_full"
    summary = "PixelCNN++ (5 resnets, 160 filters), untrained: the last pixels of an image"

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each size of image."""
        pixelcnnpp = example("pixelcnnpp")
        model = pixelcnnpp.full_model()
        for side, count in ((8, 12), (32, 12)):
            image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(settings.seed)) * 2 - 1
            case = f"{side}x{side}, the last {count} pixels, batch 1"
            yield _row(case, settings, pixelcnnpp.inpaint, None, (model, image, count), rounds=1)


class PixelCnnSampling(Benchmark):
    """The small PixelCNN++ on digits 28x28, batch 16; by hand: rows are cached."""

    name = "pixelcnnpp"
    summary = "PixelCNN++ (1 resnet a level, 16 filters), digits 28x28"

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield the row."""
        pixelcnnpp, cached = example("pixelcnnpp"), example("pixelcnnpp_cached")
        model = pixelcnnpp.digits_model()
        yield _row(
            "batch 16", settings, pixelcnnpp.sample, lambda m, n: cached.sample_cached(m, n, 28), (model, 16), rounds=1
        )


class TransformerSampling(Benchmark):
    """The causal transformer over 784 pixels of 16 levels, batch 4; by hand: keys and values are cached."""

    name = "transformer"
    summary = "causal transformer over digit pixels, 16 levels, T=784"

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield the row."""
        transformer = example("pixel_transformer")
        model = transformer.digits_model()
        yield _row("batch 4", settings, transformer.sample, transformer.sample_cached, (model, 4), rounds=1)
