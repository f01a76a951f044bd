"""Kernels for NumPy arrays of float32 and float64, compiled by Numba: the specification's functions, in few passes.

Importing this package imports Numba, and so is left to ``hpcmp.kernels`` until an array asks for a kernel. In each
module a public function is a kernel and sees to shapes, copies what is not contiguous, and shares rows over threads
(``threads``); the private loops beneath it are compiled at their first call and kept on disk (``jit``). They slice
first and loop from 0, for an offset in the index keeps LLVM from vectorising. Results are the same bits for any number
of threads: what a thread adds up is a piece of fixed size.
"""

from . import activation, attention, loss, norm, update

#: What ``hpcmp.kernels`` overrides the specification with.
MODULES = activation, attention, loss, norm, update
