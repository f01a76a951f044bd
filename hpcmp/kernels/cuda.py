"""Kernels for CuPy arrays: the reference, which is written in the API that both libraries share.

Nothing here has run on a GPU yet (see docs/gpu.md).
"""

from __future__ import annotations
