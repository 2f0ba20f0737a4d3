"""The example models: causal where they must be, trainable, and equal to their hand-written cached samplers."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from safetensors.torch import load_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> Any:
    """A module of examples/, which import each other by plain names as `python examples/NAME.py` does."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


data, made, pixelcnnpp, cached = (example(n) for n in ("digits", "made", "pixelcnnpp", "pixelcnnpp_cached"))
transformer, flow, rnn, ddim = (example(n) for n in ("pixel_transformer", "flow", "rnn_digits", "ddim"))
independent, sinkhorn, weights = (example(n) for n in ("independent", "sinkhorn", "weights"))
train_all = example("train_all")

TINY = pixelcnnpp.Settings(channels=1, filters=4, resnets=1, mixtures=3, dropout=0.0, weight_norm=False)
TINY_COLOUR = pixelcnnpp.Settings(channels=3, filters=4, resnets=2, mixtures=2, dropout=0.0, weight_norm=True)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def first_dependence(net: Callable[[Tensor], Tensor], x: Tensor, position: int) -> int:
    """The first output position (dimension 1 of net(x)) of which a bit changes where the input's `position` changes."""
    changed = x.clone()
    changed[:, position] = x[:, position] + 1 if x.is_floating_point() else (x[:, position] + 1) % 2
    with torch.no_grad():
        differs = (net(x) != net(changed)).flatten(2).any(-1).any(0)
    return int(differs.nonzero()[0]) if differs.any() else differs.shape[0]


def assert_causal(net: Callable[[Tensor], Tensor], x: Tensor, positions: range) -> None:
    """Output t depends on inputs before t only, and on the one before it indeed somewhere."""
    reached = [first_dependence(net, x, position) - position for position in positions]
    assert min(reached) == 1


def made_positions(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).unflatten(-1, (2, -1)).transpose(1, 2)


def raster_positions(model: nn.Module, channels: int, size: int) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x.view(-1, size, size, channels).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)


def test_digits_have_the_stated_ranges() -> None:
    images = data.digits(28)
    assert images.shape == (1797, 28, 28)
    assert images.min() == 0
    assert images.max() <= 1
    strokes = data.strokes(28)
    assert strokes.min() == 0
    assert strokes.max() == 1
    assert ((strokes > 0) & (strokes < 1)).float().mean() < 0.2
    assert data.labels().unique().tolist() == list(range(10))
    assert data.tokens(images).unique().tolist() == list(range(16))
    assert data.signed(images).min() == -1
    noisy = data.dequantised(images, 17)
    assert noisy.min() >= 0
    assert noisy.max() < 1
    assert (noisy * 17 - images * 16).max() < 1.001


def test_patches_repeat_for_a_seed_and_differ_between_seeds() -> None:
    patches = data.photograph_patches(5, seed=3)
    assert patches.shape == (5, 3, 32, 32)
    assert torch.equal(patches, data.photograph_patches(5, seed=3))
    assert not torch.equal(patches, data.photograph_patches(5, seed=4))


def test_made_is_causal() -> None:
    model = made.MADE(20, 64)
    assert_causal(made_positions(model), torch.randn(3, 20), range(19))


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_the_causality_check_sees_one_leaking_mask_entry(layer: int) -> None:
    model = made.MADE(20, 64)
    mask = model.net[layer].mask
    later, earlier = (mask == 0).nonzero()[(mask == 0).nonzero()[:, 0] > 0][-1].tolist()
    mask[later, earlier] = 1
    with torch.no_grad():
        for linear in (model.net[0], model.net[2]):
            linear.bias.fill_(4.0)  # no rectifier hides the leak
    with pytest.raises(AssertionError):
        assert_causal(made_positions(model), torch.randn(8, 20), range(20))


@pytest.mark.parametrize("settings", [TINY, TINY_COLOUR])
def test_pixelcnnpp_is_causal_in_raster_order(settings: Any) -> None:
    model = pixelcnnpp.PixelCNNpp(settings).eval()
    assert_causal(raster_positions(model, settings.channels, 8), torch.randn(2, 64, settings.channels), range(63))


def test_the_causality_check_sees_a_kernel_that_reaches_right() -> None:
    model = pixelcnnpp.PixelCNNpp(TINY).eval()
    layer = model.up[0].ul[0].first
    layer.left, layer.right = 0, 1
    with pytest.raises(AssertionError):
        assert_causal(raster_positions(model, 1, 8), torch.randn(2, 64, 1), range(63))


def test_pixelcnnpp_has_the_papers_layers() -> None:
    with torch.device("meta"):
        full = pixelcnnpp.PixelCNNpp(pixelcnnpp.PAPER_MNIST)
    assert sum(len(level.ul) for level in full.up) == 15
    assert [len(level.ul) for level in full.down] == [5, 6, 6]
    assert full.head.out_channels == 30


def test_transformer_is_causal() -> None:
    model = transformer.PixelTransformer(12, 5, 16, 2, 2).eval()
    assert_causal(model, torch.randint(5, (3, 12)), range(11))


def test_hidden_unit_cache_equals_the_ordinary_loop(float64: None) -> None:
    model = made.MADE(30, 17)
    torch.manual_seed(1)
    ordinary = made.sample(model, 7)
    torch.manual_seed(1)
    torch.testing.assert_close(made.sample_cached(model, 7), ordinary, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pixelwise", [False, True])
@pytest.mark.parametrize(("settings", "size"), [(TINY, 12), (TINY_COLOUR, 8)])
def test_row_and_pixel_caches_equal_the_ordinary_loop(float64: None, settings: Any, size: int, pixelwise: bool) -> None:
    model = pixelcnnpp.PixelCNNpp(settings).eval()
    torch.manual_seed(1)
    ordinary = pixelcnnpp.sample(model, 2, size)
    torch.manual_seed(1)
    drawn = cached.sample_cached(model, 2, size, pixelwise=pixelwise)
    assert ordinary.std() > 0.3
    torch.testing.assert_close(drawn, ordinary, rtol=1e-10, atol=1e-10)


def test_key_value_cache_equals_the_ordinary_loop(float64: None) -> None:
    model = transformer.PixelTransformer(16, 5, 16, 2, 2).eval()
    x = torch.randint(5, (3, 16))
    caches = model.caches(3)
    with torch.no_grad():
        stepped = [model.step(x[:, t - 1] if t else None, caches, t) for t in range(16)]
        torch.testing.assert_close(torch.stack(stepped, 1), model(x), rtol=1e-12, atol=1e-12)
    drawn = []
    for sampler in (transformer.sample, transformer.sample_prefix, transformer.sample_cached):
        torch.manual_seed(1)
        drawn.append(sampler(model, 3))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert transformer.sample_categorical(model, 3).shape == (3, 16)


@pytest.mark.parametrize("channels", [1, 3])
def test_drawn_pixels_are_clipped_and_follow_their_mixture(channels: int) -> None:
    mixtures, n = 4, 20_000
    width = 1 + 2 * channels + channels * (channels - 1) // 2
    parameters = torch.zeros(n, width, mixtures)
    parameters[:, 0, 2] = 50.0  # the third logistic is sure to be picked,
    parameters[:, 1 : 1 + channels, 2] = 0.25  # whose means are these,
    parameters[:, 1 + channels : 1 + 2 * channels] = -5.0
    parameters[:, 1 + 2 * channels :, 2] = math.atanh(0.5)  # and half of each earlier channel is added
    drawn = pixelcnnpp.draw(parameters.flatten(1), channels)
    expected = [0.25, 0.375, 0.5625][:channels]
    assert drawn.shape == (n, channels)
    torch.testing.assert_close(drawn.mean(0), torch.tensor(expected), atol=2e-3, rtol=0)
    parameters[:, 1 : 1 + channels] = 30.0
    assert (pixelcnnpp.draw(parameters.flatten(1), channels) == 1).all()


def test_the_levels_of_a_pixel_have_total_mass_one() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            row = torch.tensor([0.1, -0.4, 0.3, -0.8, -1.0, -2.5])  # 2 mixtures: logits, means, log scales
            return row.view(1, 6, 1, 1).expand(x.shape[0], 6, 1, 1)

    levels = (torch.arange(256.0) / 127.5 - 1).view(256, 1, 1, 1)
    nats = [-pixelcnnpp.negative_log_likelihood(Fixed(), level.unsqueeze(0)) * math.log(2) for level in levels]
    assert abs(float(torch.stack(nats).exp().sum()) - 1) < 1e-4


def trainings() -> dict[str, Callable[[], list[float]]]:
    torch.manual_seed(0)
    small = data.digits(8)
    return {
        "made": lambda: made.train(made.MADE(64, 64), small.flatten(1), 17, steps=40),
        "transformer": lambda: transformer.train(transformer.PixelTransformer(64, 16, 16, 1, 2), steps=30),
        "flow": lambda: flow.train(flow.untrained(flow.Settings(8, (64,))), small, steps=40),
        "rnn": lambda: rnn.train(rnn.DigitReader("hand_gru", 8, 16), small, steps=30),
        "ddim": lambda: ddim.train(ddim.Denoiser(8), steps=30, size=8),
        "pixelcnnpp": lambda: pixelcnnpp.train(pixelcnnpp.PixelCNNpp(TINY), steps=30, batch=4),
    }


@pytest.mark.parametrize("name", trainings())
def test_training_reduces_the_loss(name: str) -> None:
    losses = trainings()[name]()
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5]) if losses[0] > 0 else sum(losses[-5:]) < sum(losses[:5])


def test_training_leaves_the_callers_random_state() -> None:
    state = torch.get_rng_state()
    made.train(made.untrained(64), data.digits(8).flatten(1), 17, steps=2)
    assert torch.equal(state, torch.get_rng_state())


def test_the_flows_own_inverse_inverts_it() -> None:
    settings = flow.Settings(8, (64,))
    maf = flow.untrained(settings)
    flow.train(maf, data.digits(8), steps=20)
    z = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(maf().transform(flow.invert(maf, z)), z, atol=1e-4, rtol=1e-4)


def test_hand_written_cells_equal_torchs(float64: None) -> None:
    ours, theirs = rnn.HandGRU(3, 5), nn.GRUCell(3, 5)
    ours.input.weight, ours.input.bias = theirs.weight_ih, theirs.bias_ih
    ours.hidden.weight, ours.hidden.bias = theirs.weight_hh, theirs.bias_hh
    x, h, c = torch.randn(2, 3), torch.randn(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(ours(x, (h,))[0], theirs(x, h))
    lstm, reference = rnn.HandLSTM(3, 5), nn.LSTMCell(3, 5)
    lstm.gates.weight = nn.Parameter(torch.cat([reference.weight_ih, reference.weight_hh], dim=1))
    lstm.gates.bias = nn.Parameter(reference.bias_ih + reference.bias_hh)
    torch.testing.assert_close(lstm(x, (h, c)), reference(x, (h, c)))


@pytest.mark.parametrize("cell", list(rnn.CELLS))
def test_readers_predict_every_element(cell: str) -> None:
    for reading, shape in (("rows", (2, 8, 8)), ("pixels", (2, 64, 1))):
        xs = rnn.sequences(reading, 8)[:2]
        assert rnn.DigitReader(cell, shape[2], 6)(xs).shape == shape


def test_ddim_finds_the_image_that_an_oracle_knows() -> None:
    image = torch.rand(2, 1, 8, 8) * 2 - 1
    levels = ddim.signal_levels()

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        level = levels[t][:, None, None, None]
        estimate: Tensor = (x - level.sqrt() * image) / (1 - level).sqrt()
        return estimate

    start = torch.randn(2, 1, 8, 8)
    left = (1 - levels[0]).sqrt() * oracle(start, torch.full((2,), 999))  # time 0 still has this much noise
    torch.testing.assert_close(ddim.sample(oracle, start, 100), levels[0].sqrt() * image + left, atol=1e-4, rtol=0)


def test_heads_in_a_loop_equal_fused_attention(float64: None) -> None:
    module = independent.HeadByHead(3, 4)
    x = torch.randn(2, 6, 12)
    query, key, value = (
        torch.stack([head(x) for head in heads], dim=1) for heads in (module.query, module.key, module.value)
    )
    fused = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(module(x), module.out(fused.transpose(1, 2).flatten(2)))


def test_experts_are_weighted_by_the_gate() -> None:
    module = independent.Experts(3, 4, 8)
    with torch.no_grad():
        module.gate.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))
        x = torch.randn(5, 4)
        torch.testing.assert_close(module(x), module.experts[1](x))


def test_sinkhorn_is_doubly_stochastic_and_stops_by_tolerance() -> None:
    scores = sinkhorn.similarities(16)
    exact = sinkhorn.sinkhorn(scores)
    torch.testing.assert_close(exact.sum(-1), torch.ones(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(exact.sum(-2), torch.ones(16), atol=1e-5, rtol=0)
    assert (sinkhorn.sinkhorn_until(scores, 1e-3).sum(-1) - 1).abs().max() <= 1e-3


def test_power_method_finds_the_largest_eigenvalue() -> None:
    matrix = sinkhorn.covariance(8)
    largest = torch.linalg.eigvalsh(matrix)[-1]
    for value, _ in (
        sinkhorn.power_iteration(matrix, torch.ones(64)),
        sinkhorn.power_iteration_until(matrix, torch.ones(64)),
    ):
        torch.testing.assert_close(value, largest, rtol=1e-4, atol=0)


def test_weights_are_trained_once_and_read_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trained = []

    def train(model: nn.Linear) -> None:
        trained.append(model)
        nn.init.constant_(model.weight, 0.5)

    first = weights.pretrained("test_linear", nn.Linear(3, 2), train)
    second = weights.pretrained("test_linear", nn.Linear(3, 2), train)
    assert len(trained) == 1
    assert not second.training
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert [path.name for path in (tmp_path / "fxjacobi").iterdir()] == ["test_linear.safetensors"]
    with pytest.raises(RuntimeError, match="size mismatch"):
        weights.pretrained("test_linear", nn.Linear(4, 2), train)


def test_weights_keep_the_models_dtype(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    weights.save(model, tmp_path / "half.safetensors", torch.bfloat16)
    loaded = nn.Linear(3, 2)
    weights.load(loaded, tmp_path / "half.safetensors")
    assert loaded.weight.dtype == torch.float32
    assert torch.equal(loaded.weight, model.weight.bfloat16().float())


def test_shipped_weights_are_small_complete_and_fit_their_models(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.stem: path.stat().st_size for path in weights.SHIPPED.iterdir()}
    assert set(files) == set(train_all.recipes())
    assert max(files.values()) <= 4 << 20
    assert sum(files.values()) <= 12 << 20

    def refuse(*_: object) -> None:
        raise AssertionError("a shipped model was trained")

    monkeypatch.setattr(weights, "save", refuse)
    models = [made.digits_model(), pixelcnnpp.digits_model(), transformer.digits_model(), ddim.digits_model()]
    models += [rnn.digits_model(cell, reading) for cell in rnn.CELLS for reading in ("rows", "pixels")]
    assert all(not model.training for model in models)
    assert all(
        tensor.isfinite().all()
        for name in files
        for tensor in load_file(weights.SHIPPED / f"{name}.safetensors").values()
    )
    images = data.digits()
    with torch.no_grad():
        assert made.negative_log_likelihood(models[0], data.dequantised(images.flatten(1))) < -0.9
        assert pixelcnnpp.negative_log_likelihood(models[1], data.signed(data.strokes()[:20]).unsqueeze(1)) < 1
        assert transformer.cross_entropy(models[2], data.tokens(data.strokes()[:8]).flatten(1)) < 1


def test_settings_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        pixelcnnpp.SMALL.filters = 3
