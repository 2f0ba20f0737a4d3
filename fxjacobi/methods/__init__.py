"""The solver family: each method a frozen dataclass ``init / step / done`` under one driver (:mod:`fxjacobi.solve`)."""

from __future__ import annotations

from fxjacobi.methods.affine import Affine
from fxjacobi.methods.anderson import Anderson
from fxjacobi.methods.candidates import candidates
from fxjacobi.methods.chunked import Chunked
from fxjacobi.methods.damped import Damped
from fxjacobi.methods.guess import Base, Extrapolated, Given, Guess, Previous, Swept
from fxjacobi.methods.jacobi import Jacobi
from fxjacobi.methods.memory_length import memory_length
from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.native import Native
from fxjacobi.methods.newton import Newton
from fxjacobi.methods.picard import Picard
from fxjacobi.methods.quasi_newton import QuasiNewton
from fxjacobi.methods.sequential import Sequential
from fxjacobi.methods.windowed import Windowed

__all__ = [
    "Affine",
    "Anderson",
    "Base",
    "Chunked",
    "Contract",
    "Damped",
    "Extrapolated",
    "Given",
    "Guess",
    "Iterate",
    "Jacobi",
    "Method",
    "Native",
    "Newton",
    "Picard",
    "Previous",
    "QuasiNewton",
    "Sequential",
    "Swept",
    "Windowed",
    "candidates",
    "memory_length",
]
