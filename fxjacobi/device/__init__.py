"""Blocks on a device: sweeps as captured graphs, state that stays there, flags that are read one sweep late.

:func:`runner_for` says what captures graphs for a device, if anything does; the forms of the blocks (one file each) stand
on its small interface alone, so that a double on the CPU shows what they do without a device.
"""

from __future__ import annotations

from fxjacobi.device.runner import Captured, FlagReader, GraphRunner, Refused, installed, runner_for, runner_of

__all__ = ["Captured", "FlagReader", "GraphRunner", "Refused", "installed", "runner_for", "runner_of"]
