"""Text to token files, and token files to batches whose order does not depend on the layout.

prepare     text files -> one HDF5 token file            (run once, before the job)
TokenFile   a token file, checked before use
Sampler     sample number -> where its tokens start      (a pure function of seed and number)
Batches     step -> this rank's inputs and targets
"""

from .loader import Batch, Batches
from .prepare import Prepared, prepare
from .sampler import Sampler
from .tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer, tokenizer_from
from .tokens import Split, TokenFile

__all__ = [
    "Batch",
    "Batches",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "Prepared",
    "Sampler",
    "Split",
    "TokenFile",
    "Tokenizer",
    "load_tokenizer",
    "prepare",
    "tokenizer_from",
]
