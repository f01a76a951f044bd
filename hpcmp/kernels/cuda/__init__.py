"""Kernels for CuPy arrays, in CUDA C++: overrides of the specification; what is not here runs as it stands there.

In each module a public function is a kernel of the specification, for float32, float64 and, as they are, arrays of 16
bits, which are added up in float32 and rounded once. The sources are under ``sources``; ``launch`` compiles and
launches them. Sums are made in a fixed order: the same bits in every run.

Nothing here has run on a GPU yet (see docs/gpu.md); tests/kernels/emulation runs it on the CPU.
"""

from . import activation, attention, embedding, epilogue, fp8, gemm, loss, moe, norm, positional, squares, update

#: What ``hpcmp.kernels`` overrides the specification with.
MODULES = activation, attention, embedding, epilogue, fp8, gemm, loss, moe, norm, positional, squares, update

#: The kernels here that serve 16-bit arrays as they are: all.
NATIVE = frozenset(
    name
    for module in MODULES
    for name, value in vars(module).items()
    if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
)
