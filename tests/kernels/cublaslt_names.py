"""The names and numbers of cuBLASLt that hpcmp uses, as ``nvmath.bindings.cublasLt`` has them."""

from __future__ import annotations

import enum


class MatmulDescAttribute(enum.IntEnum):
    TRANSA = 3
    TRANSB = 4
    EPILOGUE = 7
    BIAS_POINTER = 8
    EPILOGUE_AUX_POINTER = 11
    EPILOGUE_AUX_LD = 12
    A_SCALE_POINTER = 17
    B_SCALE_POINTER = 18


#: The attributes of 8 bytes; the others have 4.
LONG = {
    MatmulDescAttribute.BIAS_POINTER,
    MatmulDescAttribute.EPILOGUE_AUX_POINTER,
    MatmulDescAttribute.EPILOGUE_AUX_LD,
    MatmulDescAttribute.A_SCALE_POINTER,
    MatmulDescAttribute.B_SCALE_POINTER,
}


class MatmulPreferenceAttribute(enum.IntEnum):
    MAX_WORKSPACE_BYTES = 1
    REDUCTION_SCHEME_MASK = 3
    MIN_ALIGNMENT_A_BYTES = 5
    MIN_ALIGNMENT_B_BYTES = 6
    MIN_ALIGNMENT_C_BYTES = 7
    MIN_ALIGNMENT_D_BYTES = 8


class Epilogue(enum.IntEnum):
    DEFAULT = 1
    BIAS = 4
    GELU_AUX = 32 | 128
    GELU_AUX_BIAS = 32 | 128 | 4
    DGELU = 64 | 128
    BGRADA = 256
    BGRADB = 512


AUX = 128  # the bit of an epilogue with a second matrix
