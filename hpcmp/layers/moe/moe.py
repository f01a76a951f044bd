"""MixtureOfExperts: router, dispatch, experts and the weighted sum as one layer."""

from __future__ import annotations

from typing import Any, Literal

from ... import kernels
from ...arrays import Array
from ...module import Initial, Module
from ...wgrad import WGrad
from ..parallel import ModelParallel
from .dispatch import Dispatch
from .experts import Experts
from .router import Router


class MixtureOfExperts(Module):
    """y = sum over the k experts that the router chose for x of g_e expert_e(x), + shared(x).

    x and y (s, batch, h), as the activations between layers lie. Within, every rank of tp has this rank's whole
    context, T tokens; the experts are shared over ``parallel.ep`` by their number and over tp by their inner width. A
    token's row goes to the rank of each chosen expert and back by all-to-all; y is the sum over tp of what the ranks
    have. ``shared`` > 0 adds an MLP ``shared`` times as wide as an expert that every token goes to; it is computed
    while rows travel. Every sum has one order: the same layout gives the same bits in every run. ``experts`` and
    ``per_token`` are numbers, ``ffn`` the width of an expert; ``router``, ``capacity`` and the weights of the losses
    are those of Router, ``gated`` and ``bias`` those of Experts.

    Shazeer et al., "Outrageously large neural networks", 2017; Lepikhin et al., "GShard", 2020; without capacity, Gale
    et al., "MegaBlocks", 2022; shared experts: Dai et al., "DeepSeekMoE", 2024, equation 9.
    """

    def __init__(
        self,
        parallel: ModelParallel,
        features: int,
        ffn: int,
        experts: int,
        per_token: int,
        *,
        shared: int = 0,
        gated: bool = False,
        bias: bool = False,
        router: Literal["softmax", "sigmoid"] = "softmax",
        capacity: float | None = None,
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
        initial: Initial | None = None,
        leaving: Initial | None = None,
    ) -> None:
        self.enter, self.leave, self.ep, self.count = parallel.enter, parallel.leave, parallel.ep, experts
        losses = {"balance_loss": balance_loss, "z_loss": z_loss}
        self.router = Router(
            parallel, features, experts, per_token, kind=router, capacity=capacity, initial=initial, **losses
        )
        made: dict[str, Any] = {"gated": gated, "bias": bias, "initial": initial, "leaving": leaving}
        self.experts = Experts(parallel, features, ffn, experts, ep=parallel.ep, **made)
        self.shared = Experts(parallel, features, shared * ffn, 1, **made) if shared else None

    def forward(self, x: Array) -> tuple[Array, Any]:
        whole = self.enter(x)
        k, tokens = kernels.of(whole), kernels.of(whole).rows(whole)
        (gates, chosen), routed = self.router.forward(whole)
        gates = gates.astype(whole.dtype)
        dispatch = Dispatch(self.ep, chosen, self.count)
        going = dispatch.start(k.take_rows(tokens, dispatch.token))
        y, always = self.shared.forward((tokens, [len(tokens)])) if self.shared else (0, None)
        rows, kept = self.experts.forward((going.wait(), dispatch.rows))
        choices = dispatch.start_back(rows).wait()
        y = y + k.combine(gates, choices)
        return self.leave(y.reshape(whole.shape)), (gates, choices, dispatch, routed, kept, always)

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> Array:
        gates, choices, dispatch, routed, kept, always = saved
        whole = self.leave.T(dy)
        k, dtokens = kernels.of(whole), kernels.of(whole).rows(whole)
        going = dispatch.start(k.take_rows(dtokens, dispatch.token, gates.reshape(-1)[dispatch.order]))
        dx = k.rows(self.router.backward(k.combine_backward_gates(dtokens, choices), routed, wgrad))
        if self.shared:
            dx = dx + self.shared.backward(dtokens, always, wgrad)
        drows = self.experts.backward(going.wait(), kept, wgrad)
        dx = dx + dispatch.start_back(drows).wait().sum(1)
        return self.enter.T(dx.reshape(whole.shape))
