"""PixelCNN++ with all the layers of the paper's size, but narrow: found, proven and equal, when it in-paints an image."""

from __future__ import annotations

import torch

import fxjacobi
from fxjacobi.bench.example_models import example
from fxjacobi.loops import Kind
from fxjacobi.verify import equal


def test_the_last_pixels_of_an_image() -> None:
    channels, count = 3, 12
    pixelcnnpp = example("pixelcnnpp")
    settings = pixelcnnpp.Settings(channels=channels, filters=6)
    assert (settings.resnets, settings.mixtures, settings.weight_norm) == (5, 10, True)
    model = pixelcnnpp.full_model(settings)
    image = torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    compiled = fxjacobi.compile(pixelcnnpp.inpaint, measure=False)
    given = 64 - count
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = compiled(model, image, count)
        torch.manual_seed(seed)
        assert equal(found, pixelcnnpp.inpaint(model, image, count))
        assert torch.equal(found.flatten(2)[..., :given], image.flatten(2)[..., :given])
    (block,) = [b for b in compiled.plan.blocks if b.kind is Kind.WRITES]
    assert block.equations == count
    (report,) = [b for b in compiled.report.blocks if b.name == block.name]
    assert report.sweeps < count
