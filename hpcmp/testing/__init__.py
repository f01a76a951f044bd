"""Checks that any collective or layer must pass; public, so that you can test your own with them.

Vectors lie over the ranks of a group in one of three layouts (see ``hpcmp.collectives``), each with an inner product:

    I  invariant  the same array on every rank, counted once    <a, b> = a . b
    V  varying    an array of its own on each rank              <a, b> = sum_r a_r . b_r
    P  partial    each rank holds a summand                     <a, b> = sum_r a_r . b_r

The checks are collective over their group: every rank calls them, and if any rank finds an error, every rank raises the
same ``AssertionError``, so that a failing check never leaves the others waiting. On NumPy and CuPy arrays alike.
"""

from .adjoint import assert_adjoint, inner
from .gradients import gradcheck
from .group import complete, draw, prepare
from .serial import activations, assert_owned_once, equals_serial, share, whole

__all__ = [
    "activations",
    "assert_adjoint",
    "assert_owned_once",
    "complete",
    "draw",
    "equals_serial",
    "gradcheck",
    "inner",
    "prepare",
    "share",
    "whole",
]
