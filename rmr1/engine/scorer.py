"""A model with its fused head, in one module.

Under ZeRO-3 a parameter is there only inside the forward of the module that was handed to
DeepSpeed: a head that multiplies by `model.lm_head_weight` outside of it sees an empty tensor. So
what uses the head is a forward.
"""

from __future__ import annotations

from torch import Tensor, nn

from rmr1.engine.attention import PackedAttention
from rmr1.engine.model import CausalLM
from rmr1.engine.packing import Batch
from rmr1.kernels.token_logprob import token_logprobs
from rmr1.kernels.token_loss import ChunkLoss, token_loss


class Scorer(nn.Module):
    """Log-probabilities of a batch's response tokens, or the loss made of them."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: Batch, temperature: float = 1.0, loss: ChunkLoss | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score the R response tokens of `batch`.

        Returns:
            Log-probabilities and entropies, [R] each, with autograd. With `loss`, the sum of the
            losses that it gives for runs of tokens (a scalar with autograd, see `token_loss`), and
            entropies without.
        """
        attend = PackedAttention.of_groups(batch.groups)
        hidden = self.model(batch.token_ids, batch.positions, attend)  # [T, H]
        predicting, head = hidden[batch.predict_index], self.model.lm_head_weight  # [R, H], [V, H]
        if loss is None:
            return token_logprobs(
                predicting, head, batch.targets, temperature=temperature, return_entropy=True
            )
        value, _, entropy = token_loss(
            predicting, head, batch.targets, loss, temperature=temperature
        )
        return value, entropy
