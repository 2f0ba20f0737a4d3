"""What must hold on any device: the GPU tests run these on CUDA, tests/integration on the CPU."""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import fxjacobi
from fxjacobi.bench.example_models import example
from fxjacobi.testing import assert_equal_bits, assert_equivalent

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from fxjacobi.testing import Program


class GruLoop(nn.Module):
    """``h_t = GRUCell(x_t, h_{t-1})`` over ``x`` ``(T, B, 8)``."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, states = None, []
        for t in range(x.shape[0]):
            h = self.cell(x[t], h)
            states.append(h)
        return torch.stack(states)


def triangular(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A loop that repeats itself: a strictly triangular system, iterated more often than it is deep."""
    z = torch.zeros_like(x)
    for _ in range(60):
        z = x - torch.tanh(z @ weight)
    return z


def triangular_arguments(device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.triu(torch.randn(8, 8, generator=generator), 1)
    return torch.randn(5, 8, generator=generator).to(device), weight.to(device)


def spectral(x: torch.Tensor) -> torch.Tensor:
    """A loop whose body asks the host whether a decomposition worked, so that no graph can hold it."""
    for _ in range(40):
        x = torch.diag_embed(torch.round(torch.linalg.eigvalsh(x) / 2))
    return x


class Widening(nn.Module):
    """``h_t = tanh(relu((h_{t-1} + x_t) V) W)``, whose steps need far more memory inside than their state takes."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(hidden, 16 * hidden), nn.Linear(16 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, states = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            h = torch.tanh(self.narrow(torch.relu(self.wide(h + x[t]))))
            states.append(h)
        return torch.stack(states)


def gru(device: torch.device) -> GruLoop:
    torch.manual_seed(0)
    return GruLoop().to(device).requires_grad_(False)


def noise(device: torch.device, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def method_of(compiled: fxjacobi.SolvedModule) -> str:
    return " ".join(f"{block.method} {block.reason}" for block in compiled.plan.blocks)


# -- exactness -----------------------------------------------------------------------------------------------------


def check_program(program: Program, device: torch.device, outcomes: Counter[str]) -> None:
    """A generated program does on ``device``, compiled, all that it does ordinarily."""
    model = program.build(device)
    compiled = fxjacobi.compile(model, measure=False)
    with torch.set_grad_enabled(program.grad), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            assert_equivalent(compiled, model, partial(program.make_args, seed, device), seed=seed)
            outcomes["solved" if compiled.report.solved else "original"] += 1
    outcomes["programs"] += 1
    for warning in caught:
        assert "please report this" not in str(warning.message), warning.message  # a fault of the compiler's own
        if issubclass(warning.category, fxjacobi.ExactnessWarning):
            outcomes["demoted"] += 1


def check_sample(sample: Callable[..., torch.Tensor], *args: Any, steps: int) -> None:
    """From the same seed, the compiled sampler draws the same sample in fewer sweeps than there are steps."""
    compiled = fxjacobi.compile(sample, measure=False)
    drawn = []
    for seed in range(4):
        torch.manual_seed(seed)
        drawn.append(sample(*args))
        torch.manual_seed(seed)
        assert_equal_bits(compiled(*args), drawn[-1])
    assert compiled.report.solved, compiled.report.reason
    assert 0 < compiled.report.sweeps < steps, compiled.plan
    assert not torch.equal(drawn[0], drawn[1]), "another seed draws another sample"


def check_made(device: torch.device) -> None:
    made, data = example("made"), example("digits")
    model = made.untrained(64).to(device)
    made.train(model, data.digits(8).flatten(1).to(device), 17, steps=40)
    check_sample(made.sample, model.requires_grad_(False), 3, steps=64)


def check_pixelcnnpp(device: torch.device, channels: int) -> None:
    pixelcnnpp = example("pixelcnnpp")
    torch.manual_seed(0)
    sizes = pixelcnnpp.Settings(channels, filters=4, resnets=1, mixtures=3, dropout=0.0, weight_norm=channels == 3)
    model = pixelcnnpp.PixelCNNpp(sizes).to(device).eval().requires_grad_(False)
    check_sample(pixelcnnpp.sample, model, 2, 8, steps=64)


def check_flow_inverse(device: torch.device) -> None:
    flows, data = example("flow"), example("digits")
    maf = flows.untrained(flows.Settings(size=8, hidden=(32,))).to(device)
    flows.train(maf, data.digits(8).to(device), steps=20)
    inverse = maf.requires_grad_(False)().transform.inv
    compiled = fxjacobi.compile(inverse, measure=False)
    with torch.no_grad():
        for seed in range(3):
            z = noise(device, 3, 64, seed=seed)
            assert_equal_bits(compiled(z), inverse(z))
    assert compiled.report.solved, compiled.report.reason
    assert 0 < compiled.report.sweeps < 64, compiled.plan


def check_gru_exact(device: torch.device) -> None:
    model = gru(device)
    compiled = fxjacobi.compile(model, measure=False)
    for seed in range(4):
        x = noise(device, 100, 3, 8, seed=seed)
        assert_equal_bits(compiled(x), model(x))
    assert compiled.report.solved, compiled.report.reason


def check_gru_tolerance(device: torch.device, method: str, rtol: float = 1e-5) -> None:
    """Within the tolerance of a float64 run, up to what the ordinary run itself is off by."""
    model = gru(device)
    compiled = fxjacobi.compile(model, rtol=rtol, method=method, measure=False)
    for seed in range(4):
        x = noise(device, 100, 3, 8, seed=seed)
        found, ordinary = compiled(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
        error, usual = (float((value.double() - exact).abs().max()) for value in (found, ordinary))
        assert error <= 10 * rtol * float(exact.abs().max()) + 2 * usual, (error, usual)
    assert compiled.report.solved, compiled.report.reason
    assert method in method_of(compiled), compiled.plan


# -- graphs --------------------------------------------------------------------------------------------------------


def check_refused_and_recovered(device: torch.device, *, captures: bool) -> None:
    """What no graph can hold runs uncaptured, the plan says why, and what comes after it is captured as ever."""
    with torch.no_grad():
        refused = fxjacobi.compile(spectral, measure=False)
        for seed in range(3):
            x = noise(device, 6, 6, seed=seed) * 20
            x = x + x.T
            assert_equal_bits(refused(x), spectral(x))
        assert refused.report.solved, refused.report.reason
        captured = fxjacobi.compile(triangular, measure=False)
        for seed in range(3):
            assert_equal_bits(
                captured(*triangular_arguments(device, seed)), triangular(*triangular_arguments(device, seed))
            )
        assert captured.report.sweeps < 60
    if captures:
        assert "uncaptured" in method_of(refused), refused.plan
        assert "captured graph" in method_of(captured), captured.plan
        assert "uncaptured" not in method_of(captured), captured.plan


def quiet_cases(device: torch.device) -> dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[Any, ...]]]:
    """Programs whose solve the host need not wait for: the callable, its options, and arguments."""
    made = example("made")
    model = made.untrained(16).to(device).requires_grad_(False)
    return {
        "fixed point": (triangular, {}, triangular_arguments(device)),
        "sampling": (made.sample, {}, (model, 3)),
        "exact recurrence": (gru(device), {}, (noise(device, 100, 2, 8),)),
        "chunked recurrence": (gru(device), {"rtol": 1e-5, "method": "chunked"}, (noise(device, 100, 2, 8),)),
    }


def check_quiet(name: str, device: torch.device, forbidden: Callable[[], AbstractContextManager[Any]]) -> None:
    """Once captured, a call does nothing inside ``forbidden``, which raises where the host waits for the device."""
    model, options, args = quiet_cases(device)[name]
    compiled = fxjacobi.compile(model, measure=False, **options)
    with torch.no_grad():
        for _ in range(3):  # recorded; emitted and captured; replayed
            torch.manual_seed(1)
            compiled(*args)
        torch.manual_seed(1)
        with forbidden():
            found = compiled(*args)
        torch.manual_seed(1)
        wanted = model(*args)
    assert compiled.report.solved, compiled.report.reason
    if options:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    else:
        assert_equal_bits(found, wanted)


def check_several_at_once(device: torch.device) -> None:
    """Compiled modules take turns, and run in threads of their own, without disturbing one another."""
    first, second = gru(device), gru(device)
    with torch.no_grad():
        second.cell.weight_hh.mul_(0.5)
        modules = [(fxjacobi.compile(m, measure=False), m) for m in (first, second)]
        modules.append((fxjacobi.compile(first, rtol=1e-5, method="chunked", measure=False), first))
        kept = []
        for seed in range(4):
            x = noise(device, 80, 2, 8, seed=seed)
            for compiled, model in modules:
                kept.append((compiled(x), model(x)))
        for found, wanted in kept:  # a later call must not write over what an earlier one returned
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        failures: list[BaseException] = []
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            threads = [threading.Thread(target=_repeat, args=(c, m, device, failures)) for c, m in modules]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
    assert not failures, failures[0]


def _repeat(
    compiled: Callable[..., torch.Tensor],
    model: Callable[..., torch.Tensor],
    device: torch.device,
    failures: list[BaseException],
) -> None:
    try:
        with torch.no_grad():
            for seed in range(5):
                x = noise(device, 80, 2, 8, seed=seed)
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    except BaseException as failure:  # noqa: BLE001 - handed to the thread that asserts
        failures.append(failure)


def check_memory_limit(device: torch.device) -> None:
    """A sweep that may not allocate what all steps need runs in ranges of steps, with the same answer."""
    model = gru(device)
    x = noise(device, 120, 4, 8)
    with torch.no_grad():
        wanted = model(x)
        for method in ("jacobi", "chunked"):
            compiled = fxjacobi.compile(model, rtol=1e-5, method=method, measure=False, memory_limit=1 << 16)
            compiled(x)
            torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-5)
            assert compiled.report.solved, compiled.report.reason
