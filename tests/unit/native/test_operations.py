"""Each operation's machine form computes what PyTorch computes, special values included."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as PyTorch's own code has it
from hypothesis import example, given
from hypothesis import strategies as st

from fxjacobi.native.emitter import NoMachineFormError
from fxjacobi.native.steps import inputs_of, written
from tests.unit.native.natively import assert_rounded, compiled, computed

if TYPE_CHECKING:
    from collections.abc import Callable

SPECIAL = [
    math.nan,
    math.inf,
    -math.inf,
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-40,
    -1e-40,
    1e30,
    -1e30,
    88.7,
    89.5,
    -87.5,
    -104.5,
    0.35,
]
UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    f.__name__: f
    for f in (
        torch.neg, torch.abs, torch.exp, torch.expm1, torch.sigmoid, torch.tanh, torch.log, torch.log1p, torch.sqrt,
        torch.rsqrt, torch.reciprocal, torch.square, torch.erf, torch.floor, torch.ceil, torch.trunc, torch.relu,
        F.silu, F.softplus, F.elu, F.leaky_relu, F.hardtanh, F.relu6, F.hardsigmoid, F.softsign, F.logsigmoid,
    )
}  # fmt: skip
UNARY |= {
    "sin": lambda x: torch.sin(x.clamp(-100, 100)),  # far out, the C library and vector code reduce arguments otherwise
    "cos": lambda x: torch.cos(x.clamp(-100, 100)),
    "gelu": lambda x: F.gelu(x.clamp(-1, 4)),  # further below zero, PyTorch's own loses digits
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: x.clamp_max(0.1),
    "clamp to tensors": lambda x: x.clamp(torch.tanh(x) * 0.1, x.abs().sqrt()),
    "power of 2": lambda x: x**2,
    "power of 3": lambda x: x**3,
    "power of 2.5": lambda x: x**2.5,
    "2 to the power": lambda x: 2.0**x,
    "1 - x": lambda x: 1.0 - x,
    "x / 3": lambda x: x / 3,
    "3 / x": lambda x: 3 / x,
    "where": lambda x: torch.where(x > 0.1, x, -2.0 * x),
    "masked_fill": lambda x: x.masked_fill(x <= 0.3, 7.0),
    "a bool": lambda x: (x >= 0.0) & (x.isnan().logical_not()),
    "a bool as a number": lambda x: (x != x.floor()).to(x.dtype) * x,
    "float64 and back": lambda x: (x.double() * 3).float(),
    "full": lambda x: torch.full_like(x, 2.5) + torch.ones_like(x) - torch.zeros_like(x),
    "nan_to_num": lambda x: torch.nan_to_num(x, 1.0, 2.0, 3.0),
}


def _values(count: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 10.0, 100.0])[torch.randint(4, (count,), generator=generator)]
    return (torch.randn(count, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", UNARY)
def test_elementwise_of_one(name: str, dtype: torch.dtype) -> None:
    function = UNARY[name]
    x = torch.cat([torch.tensor(SPECIAL, dtype=dtype), _values(301, 0, dtype)])
    wanted, found = function(x), computed(function, x)
    assert found.dtype is wanted.dtype
    if wanted.is_floating_point():
        torch.testing.assert_close(found, wanted, rtol=8 * torch.finfo(dtype).eps, atol=1e-37, equal_nan=True)
    else:
        assert torch.equal(found, wanted)


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
@example([88.722839, 88.72284, -87.33655, -103.97208, -103.9721])  # where exp overflows, and where it underflows
def test_transcendental_functions_anywhere(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    functions: list[Callable[[torch.Tensor], torch.Tensor]] = [torch.exp, torch.expm1, torch.tanh, torch.sigmoid]
    found = computed(lambda x: torch.stack([f(x) for f in functions]), x)
    wanted = torch.stack([f(x.double()).float() for f in functions])
    torch.testing.assert_close(found, wanted, rtol=4e-7, atol=2e-45, equal_nan=True)


BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    f.__name__: f for f in (torch.mul, torch.div, torch.maximum, torch.minimum, torch.eq, torch.ne, torch.lt, torch.le, torch.ge)
} | {
    "add": lambda a, b: torch.add(a, b, alpha=0.5),
    "sub": lambda a, b: torch.sub(a, b, alpha=2),
    "rsub": torch.rsub,
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5),
    "logical": lambda a, b: torch.logical_xor(a > 0, b > 0) | torch.logical_and(a < b, a > -1),
    "select": lambda a, b: torch.where(a > b, a, 0.0),
}  # fmt: skip


@pytest.mark.parametrize(
    "shapes", [((5, 16), (5, 16)), ((5, 1), (1, 16)), ((5, 16), (16,)), ((), (5, 16)), ((3, 1, 4), (2, 4))]
)
@pytest.mark.parametrize("name", BINARY)
def test_elementwise_of_two(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes))
    assert_rounded(computed(BINARY[name], a, b), BINARY[name](a, b), 2.0)
    # An operand that takes arithmetic is not computed again for each element that it is spread over.
    spread: Callable[..., torch.Tensor] = lambda a, b: BINARY[name](torch.exp(a), b)  # noqa: E731
    assert_rounded(computed(spread, a, b), spread(a, b), 4.0)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "slice": lambda x: x[:, 1:3],
    "slice with a step": lambda x: x[:, ::2, 1:],
    "slice from the end": lambda x: x[-2:, :, -3:-1],
    "select": lambda x: x[1, :, -1],
    "transpose": lambda x: x.transpose(0, -1),
    "permute": lambda x: x.permute(1, 2, 0),
    "t": lambda x: x[0].t(),
    "unsqueeze": lambda x: x.unsqueeze(1).unsqueeze(-1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "squeeze all": lambda x: x[:1, :, :1].squeeze(),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1),
    "expand what was computed": lambda x: torch.exp(x[:, :1]).expand(2, 3, 5, 6),
    "view": lambda x: x.reshape(6, -1),
    "view of a transposed": lambda x: x.transpose(0, 2).reshape(4, 18),
    "view with ones": lambda x: x[:1].reshape(4, 1, 6),
    "flatten": torch.flatten,
    "chunk": lambda x: torch.mul(*x.chunk(2, -1)),
    "split": lambda x: x.split([1, 2, 1], 1)[1],
    "split evenly": lambda x: x.split(3, 1)[1],
    "unbind": lambda x: x.unbind(1)[2] + x.unbind(-1)[0].sum(),
    "cat": lambda x: torch.cat([x, torch.tanh(x), x[:, :1]], 1),
    "cat of the first": lambda x: torch.cat([x[1:], x[:1]]),
    "stack": lambda x: torch.stack([x, 2 * x], 2),
    "sum": lambda x: x.sum(),
    "sum along": lambda x: x.sum((0, 2)),
    "sum kept": lambda x: x - x.sum(-1, keepdim=True),
    "mean": lambda x: x.mean(1),
    "amax": lambda x: x.amax((1, 2)),
    "amin": lambda x: x.amin(-1, keepdim=True),
    "variance": lambda x: x.var(-1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(1),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "rms_norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "of one element": lambda x: x[0, 0, 0].sum(0) + x[0, 0, 0].softmax(0),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_and_reductions(name: str) -> None:
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert_rounded(computed(VIEWS[name], x), VIEWS[name](x))
    # Of a value that is in no memory, and of one that does not lie there row by row.
    assert_rounded(computed(lambda x: VIEWS[name](x * 2), x), VIEWS[name](x * 2))
    turned = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_rounded(computed(VIEWS[name], turned, steady=True), VIEWS[name](turned))


PRODUCTS: dict[str, tuple[Callable[..., torch.Tensor], tuple[tuple[int, ...], ...]]] = {
    "mm": (torch.mm, ((3, 5), (5, 7))),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), ((7,), (3, 5), (5, 7))),
    "linear": (F.linear, ((3, 5), (7, 5), (7,))),
    "mv": (torch.mv, ((5, 7), (7,))),
    "addmv": (torch.addmv, ((5,), (5, 7), (7,))),
    "dot": (torch.dot, ((7,), (7,))),
    "bmm": (torch.bmm, ((2, 3, 5), (2, 5, 4))),
    "baddbmm": (torch.baddbmm, ((2, 3, 4), (2, 3, 5), (2, 5, 4))),
    "einsum": (lambda a, b: torch.einsum("bhk,bkd->bhd", a, b), ((2, 3, 5), (2, 5, 4))),
    "attention": (lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v, ((2, 3, 4), (2, 5, 4), (2, 5, 6))),
}  # fmt: skip


@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, dtype: torch.dtype, steady: bool) -> None:
    function, shapes = PRODUCTS[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    assert_rounded(computed(function, *tensors, steady=steady), function(*tensors))


@given(
    rows=st.integers(1, 9), inner=st.integers(1, 40), columns=st.integers(1, 150), transposed=st.booleans(),
    double=st.booleans(),
)  # fmt: skip
@example(rows=1, inner=16, columns=64, transposed=True, double=False)
@example(rows=4, inner=17, columns=65, transposed=False, double=True)
def test_products_with_a_matrix_that_stays(rows: int, inner: int, columns: int, transposed: bool, double: bool) -> None:
    generator = torch.Generator().manual_seed(rows + inner + columns)
    dtype = torch.float64 if double else torch.float32
    a = torch.randn(rows, inner, generator=generator, dtype=dtype)
    b = torch.randn(*((columns, inner) if transposed else (inner, columns)), generator=generator, dtype=dtype)
    b = b.t() if transposed else b
    bound = 8 * torch.finfo(dtype).eps * (a.abs() @ b.abs())
    assert bool(((computed(torch.mm, a, b, steady=True) - a @ b).abs() <= bound).all())


@pytest.mark.parametrize(
    ("function", "tensors", "why"),
    [
        (lambda x: x.long().to(x.dtype), (torch.ones(2),), "elements of torch.int64"),
        (lambda x: x.bfloat16().float(), (torch.ones(2),), "elements of torch.bfloat16"),
        (lambda x: x.sort().values, (torch.ones(2),), "aten.sort.default has no machine form"),
        (lambda x: x.cumsum(0), (torch.ones(2),), "aten.cumsum.default"),
        (lambda x: torch.addmm(x, x, x, beta=0), (torch.ones(2, 2),), "does not add"),
        (lambda x: x.view(torch.int32).view(torch.float32), (torch.ones(2),), "aten.view.dtype"),
        (lambda x: x + x[:, :0].sum(1), (torch.ones(2, 2),), "without elements"),
        (lambda x: torch.cat([x, x @ x[:, :0]], 1), (torch.ones(2, 2),), "without elements"),
    ],
)
def test_what_has_no_machine_form_is_named(
    function: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...], why: str
) -> None:
    with pytest.raises(NoMachineFormError, match=why):
        compiled(function, *tensors)


def test_a_long_chain_of_operations_is_cut() -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(700):  # one expression of it would be deeper than Python's stack
            x = 0.5 * x + 0.1
        return x

    x = torch.randn(9)
    assert_rounded(computed(chain, x), chain(x))


CHAINS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "where": lambda x: torch.where(x > 0, x, 0.5 * x),
    "square": lambda x: x * x - 0.5,
    "softplus of a view": lambda x: F.softplus(x.unsqueeze(0)).squeeze(0) - 0.5,
}


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_read_twice_is_written_once(name: str) -> None:
    """Written wherever it is read, a chain of n would be written 2^n times."""

    def chain(count: int, x: torch.Tensor) -> torch.Tensor:
        for _ in range(count):
            x = CHAINS[name](0.9 * x + 0.1)
        return x

    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert_rounded(computed(partial(chain, 12), x), chain(12, x))
    inputs = {n: compiled(partial(chain, n), x)[0] for n in (3, 6, 12)}
    sizes = {n: len(written(s, inputs_of(s)[0], 8).ir) for n, s in inputs.items()}
    assert sizes[12] - sizes[6] < 3 * (sizes[6] - sizes[3])


def test_a_steady_bool_is_written_before_the_loop() -> None:
    """Its negation once went into the loop, before which it is read: LLVM's verifier tells."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 5, generator=generator), torch.randn(5, 7, generator=generator)

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ torch.where(torch.logical_not(w > 0), w, 0.1)

    assert_rounded(computed(function, x, w, steady=True), function(x, w))
