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
        norm = h * (2 if self.style == "gpt" else 1)
        block = h * heads * d + self.heads * d * h + 2 * norm
        if self.bias:
            block += heads * d + h
        positions = self.sequence * h if self.style == "gpt" else 0
        rest = norm + positions + self.vocabulary * h * (1 if self.tied else 2)
        sparse = self.expert_layers
        mixture = h * self.experts + self.experts * self._mlp(self.expert_ffn)
        if self.shared_experts:
            mixture += self._mlp(self.shared_experts * self.expert_ffn)
        return self.layers * block + (self.layers - sparse) * self._mlp(self.ffn) + sparse * mixture + rest

    @property
    def active_parameters(self) -> int:
        """How many of them one token uses: all but those of the experts that it does not go to."""
        idle = self.experts - self.experts_per_token
        return self.parameters - self.expert_layers * idle * self._mlp(self.expert_ffn)

    @property
    def expert_layers(self) -> int:
        """How many blocks have experts in place of an MLP."""
        return sum(self.has_experts(i) for i in range(self.layers))

    def has_experts(self, block: int) -> bool:
        """Whether a block's MLP is a mixture of experts: the last of every ``experts_every``."""
        return self.experts > 0 and (block + 1) % self.experts_every == 0

    def _mlp(self, ffn: int) -> int:
        """How many numbers an MLP of inner width ``ffn`` has."""
        up = ffn * (2 if self.style == "llama" else 1)
        return self.hidden * (up + ffn) + (up + self.hidden if self.bias else 0)

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of a forward and backward, a token: 6 a weight that the token is multiplied
        with (of its experts alone), and attention.

        Causal attention over ``length`` positions costs 6 layers * heads * head_size * length (half of the square).
        Counted as in Narayanan et al., "Efficient large-scale language model training", SC 2021, appendix.
        """
        lookups = (self.sequence * self.hidden if self.style == "gpt" else 0) + (
            0 if self.tied else self.vocabulary * self.hidden
        )
        return 6.0 * (self.active_parameters - lookups) + 6.0 * self.layers * self.heads * self.head_size * length
