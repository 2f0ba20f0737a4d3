"""Autoregressive sampling on a device: MADE and PixelCNN++ at full size, trained there, beside every other way."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

import fxjacobi
from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.bench.contest import Contest, Values, rows_within
from fxjacobi.bench.example_models import example
from fxjacobi.bench.rivals import by_torch_compile, graphed, in_own_memory
from fxjacobi.testing.assertions import assert_equal_bits
from fxjacobi.timing import once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fxjacobi.bench.clock import Share

__all__ = [
    "DeviceMade784",
    "DeviceMade3072",
    "DevicePixelCnnCifar",
    "DevicePixelCnnCifarCompiled",
    "DevicePixelCnnMnist",
    "DevicePixelCnnMnistCompiled",
]


class _Network(nn.Module):
    """``model`` with another way to run its network; a sampler sees the sizes and parameters of the model."""

    def __init__(self, model: nn.Module, run: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def _seeded(seed: int, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    return function(*args)


def _against_ordinary(
    case: str, settings: Settings, sample: Callable[..., torch.Tensor], *args: Any
) -> tuple[Contest, float]:
    """Compile and compare on another seed than the recorded one; return the contest and the ordinary run's seconds.

    Raises:
        AssertionError: An element differs.
    """
    compiled = fxjacobi.compile(sample)
    _, first_s = once(partial(_seeded, settings.seed + 1, compiled, *args))
    wanted, ordinary_s = once(partial(_seeded, settings.seed + 2, sample, *args))
    assert_equal_bits(_seeded(settings.seed + 2, compiled, *args), wanted)
    facts: Values = {
        "steps": max((b.equations for b in compiled.plan.blocks), default=0),
        "sweeps": compiled.report.sweeps,
        "equal": True,
    }
    if not compiled.report.solved:
        facts["not_solved"] = compiled.report.reason
    contest = Contest(case, partial(_seeded, settings.seed + 1, sample, *args), facts)
    contest.enter("solved", partial(_seeded, settings.seed + 1, compiled, *args), first_s=first_s)
    return contest, ordinary_s


class _Made(Benchmark):
    """MADE 2x512: ``graphed`` is the whole sampling loop as one CUDA graph, ``reduce_overhead`` its compiled network."""

    features: ClassVar[int]
    share_s: ClassVar[float]

    def cases(self) -> tuple[str, ...]:
        """Every batch."""
        return tuple(f"D={self.features}, batch {batch}" for batch in (100, 16, 1))

    @torch.no_grad()
    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each batch."""
        model = self._trained(settings)
        cases = [
            (f"D={model.features}, batch {batch}", 1.0, partial(self._row, settings, model, batch))
            for batch in ((4, 1) if settings.quick else (100, 16, 1))
        ]
        yield from rows_within(self.share_s, cases)

    def _trained(self, settings: Settings) -> Any:
        made, data = example("made"), example("digits")
        features = 25 if settings.quick else self.features
        if features == 3072:
            images, levels = data.photograph_patches(4000).permute(0, 2, 3, 1).flatten(1), 256
        else:
            images, levels = data.digits(round(features**0.5)).flatten(1), 17
        model = made.untrained(features).to(settings.device)
        made.train(model, images.to(settings.device), levels, steps=3 if settings.quick else 800)
        return model.requires_grad_(False)

    def _row(self, settings: Settings, model: Any, batch: int, _: Share) -> Row:
        made = example("made")
        case = f"D={model.features}, batch {batch}"
        contest, ordinary_s = _against_ordinary(case, settings, made.sample, model, batch)
        whole = graphed(partial(made.sample, model, batch), (), settings.device)
        contest.enter("graphed", whole.run, first_s=whole.first_s, refusal=whole.refusal)
        contest.enter("by_hand", partial(_seeded, settings.seed + 1, made.sample_cached, model, batch))
        if batch in (100, 4):
            x = torch.zeros(batch, model.features, device=settings.device)
            net = by_torch_compile(model, (x,), mode="reduce-overhead")
            run = None if net.run is None else partial(made.sample, _Network(model, in_own_memory(net.run)), batch)
            contest.enter("reduce_overhead", run, first_s=net.first_s, refusal=net.refusal)
        return contest.row(settings, budget_s=max(2.0, 4 * ordinary_s))


class DeviceMade784(_Made):
    """MADE on the digits."""

    name = "gpu-made-784"
    summary = "MADE 2x512, 784 dimensions, trained on the device on digits"
    features = 784
    share_s = 35.0


class DeviceMade3072(_Made):
    """MADE on photograph patches."""

    name = "gpu-made-3072"
    summary = "MADE 2x512, 3072 dimensions, trained on the device on photograph patches"
    features = 3072
    share_s = 60.0


class _PixelCnn(Benchmark):
    """PixelCNN++ with the paper's sizes; ``graphed``: its network as a CUDA graph; ``row_cache``, ``pixel_cache``: by hand."""

    channels: ClassVar[int]
    size: ClassVar[int]
    batch: ClassVar[int]
    compiled: ClassVar[bool]
    """Whether this piece measures torch.compile, which takes a piece of its own, or everything else."""
    share_s: ClassVar[float]

    def cases(self) -> tuple[str, ...]:
        """Every batch."""
        return (f"{self.size}x{self.size}x{self.channels}, batch {self.batch}",)

    @torch.no_grad()
    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield the row."""
        size, batch = (8, 2) if settings.quick else (self.size, self.batch)
        case = f"{size}x{size}x{self.channels}, batch {batch}"
        measure = self._compiled_row if self.compiled else self._row
        yield from rows_within(self.share_s, [(case, 1.0, partial(measure, case, settings, size, batch))])

    def _trained(self, settings: Settings, size: int) -> Any:
        pixelcnnpp, data, training = example("pixelcnnpp"), example("digits"), example("training")
        sizes = pixelcnnpp.PAPER_CIFAR if self.channels == 3 else pixelcnnpp.PAPER_MNIST
        if settings.quick:
            sizes = pixelcnnpp.Settings(channels=self.channels, filters=4, resnets=1, mixtures=3)
        images = data.photograph_patches(2000, size) if self.channels == 3 else data.strokes(size).unsqueeze(1)
        torch.manual_seed(settings.seed)
        model = pixelcnnpp.PixelCNNpp(sizes).to(settings.device)
        loss = partial(pixelcnnpp.negative_log_likelihood, model)
        steps = 3 if settings.quick else 150
        training.fit(model, loss, data.signed(images).to(settings.device), steps=steps, batch=16, rate=1e-3)
        return model.requires_grad_(False)

    def _row(self, case: str, settings: Settings, size: int, batch: int, share: Share) -> Row:
        pixelcnnpp, cached = example("pixelcnnpp"), example("pixelcnnpp_cached")
        model = self._trained(settings, size)
        contest, ordinary_s = _against_ordinary(case, settings, pixelcnnpp.sample, model, batch, size)
        x = torch.zeros(batch, self.channels, size, size, device=settings.device)
        net = graphed(model, (x,), settings.device)
        run = None if net.run is None else partial(pixelcnnpp.sample, _Network(model, net.run), batch, size)
        contest.enter("graphed", run, first_s=net.first_s, refusal=net.refusal)
        seed = settings.seed + 1
        contest.enter("row_cache", partial(_seeded, seed, cached.sample_cached, model, batch, size))
        by_pixel = partial(cached.sample_cached, model, batch, size, pixelwise=True)
        if share.fits(2 * ordinary_s):
            contest.enter("pixel_cache", partial(_seeded, seed, by_pixel))
        else:
            contest.enter("pixel_cache", None, refusal="not measured: its piece's share was nearly spent")
        contest.slow |= {"graphed", "row_cache", "pixel_cache"}
        # Ordinary runs take many seconds: the one that was compared is the one that counts.
        return contest.row(settings, budget_s=5.0, ordinary_s=ordinary_s)

    def _compiled_row(self, case: str, settings: Settings, size: int, batch: int, _: Share) -> Row:
        pixelcnnpp = example("pixelcnnpp")
        model = self._trained(settings, size)
        x = torch.zeros(batch, self.channels, size, size, device=settings.device)
        contest = Contest(case, partial(_seeded, settings.seed + 1, pixelcnnpp.sample, model, batch, size))
        net = by_torch_compile(model, (x,), mode="reduce-overhead")
        run = (
            None
            if net.run is None
            else partial(pixelcnnpp.sample, _Network(model, in_own_memory(net.run)), batch, size)
        )
        contest.enter("reduce_overhead", run, first_s=net.first_s, refusal=net.refusal)
        contest.slow.add("reduce_overhead")
        return contest.row(settings, budget_s=1.0)


class DevicePixelCnnMnist(_PixelCnn):
    """28x28 digits, batch 16."""

    name = "gpu-pixelcnnpp-mnist"
    summary = "PixelCNN++, 5 resnets a level, 40 filters, 28x28, trained on the device; exact"
    channels, size, batch, compiled = 1, 28, 16, False
    share_s = 75.0


class DevicePixelCnnMnistCompiled(_PixelCnn):
    """The network of the same piece under torch.compile."""

    name = "gpu-pixelcnnpp-mnist-compiled"
    summary = "the same network under torch.compile(mode='reduce-overhead')"
    channels, size, batch, compiled = 1, 28, 16, True
    share_s = 100.0


class DevicePixelCnnCifar(_PixelCnn):
    """32x32 photograph patches in colour, batch 4."""

    name = "gpu-pixelcnnpp-cifar"
    summary = "PixelCNN++, 5 resnets a level, 160 filters, 32x32x3, trained on the device; exact"
    channels, size, batch, compiled = 3, 32, 4, False
    share_s = 100.0


class DevicePixelCnnCifarCompiled(_PixelCnn):
    """The network of the same piece under torch.compile."""

    name = "gpu-pixelcnnpp-cifar-compiled"
    summary = "the same network under torch.compile(mode='reduce-overhead')"
    channels, size, batch, compiled = 3, 32, 4, True
    share_s = 120.0
