"""What fixes the mathematics of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Architecture:
    """What fixes the mathematics of a model; nothing here depends on the layout."""

    style: Literal["gpt", "llama"]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocabulary: int
    sequence: int  # the longest sequence
    dropout: float = 0.0
    tied: bool = True
    bias: bool = True
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    init_std: float = 0.02
    experts: int = 0
    experts_every: int = 1
    experts_per_token: int = 2
    expert_ffn: int = 0
    shared_experts: int = 0
    router: Literal["softmax", "sigmoid"] = "softmax"
    capacity: float | None = None
    balance_loss: float = 0.0
    z_loss: float = 0.0

    @property
    def leaving_std(self) -> float:
        """The standard deviation of the initial weights that lead back to the residual stream. Radford et al., 2019."""
        return self.init_std / float((2 * self.layers) ** 0.5)

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        heads, d, h = self.heads + 2 * self.kv_heads, self.head_size, self.hidden
        up = self.ffn * (2 if self.style == "llama" else 1)
        norm = h * (2 if self.style == "gpt" else 1)
        block = h * heads * d + self.heads * d * h + h * up + self.ffn * h + 2 * norm
        if self.bias:
            block += heads * d + h + up + h
        positions = self.sequence * h if self.style == "gpt" else 0
        return self.layers * block + norm + positions + self.vocabulary * h * (1 if self.tied else 2)

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of a forward and backward, a token: 6 a weight that is multiplied, and attention.

        Causal attention over ``length`` positions costs 6 layers * heads * head_size * length (half of the square).
        Counted as in Narayanan et al., "Efficient large-scale language model training", SC 2021, appendix.
        """
        lookups = (self.sequence * self.hidden if self.style == "gpt" else 0) + (
            0 if self.tied else self.vocabulary * self.hidden
        )
        return 6.0 * (self.parameters - lookups) + 6.0 * self.layers * self.heads * self.head_size * length
