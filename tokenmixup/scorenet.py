"""ScoreNet: the small head whose cross-entropy measures how difficult a sample is.

Dimensions: B batch, N tokens, P prefix tokens, D width, C classes.
"""

import torch
from torch import Tensor, nn

from tokenmixup._precision import without_autocast
from tokenmixup.config import ScoreNetType


class ScoreNet(nn.Module):
    """Pools a layer's input tokens and predicts class logits.

    ``"attention"`` pools by softmax over all tokens of Linear(D, 1), ``"cls"`` takes the class
    token, ``"average"`` the mean of the patch tokens; then Linear(D, C).

    Args:
        width: D.
        num_classes: C.
        pooling: one of ``"attention"``, ``"cls"``, ``"average"``.
        num_prefix_tokens: P.
        class_token: whether token 0 is a class token.

    Raises:
        ValueError: ``"cls"`` without a class token.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        pooling: ScoreNetType,
        num_prefix_tokens: int,
        class_token: bool,
    ) -> None:
        super().__init__()
        if pooling == "cls" and not class_token:
            raise ValueError(
                "ScoreNet's pooling 'cls' reads the class token, and this model has none: "
                "use 'attention' or 'average'"
            )
        self.pooling = pooling
        self.num_prefix_tokens = num_prefix_tokens
        self.pool = nn.Linear(width, 1) if pooling == "attention" else None
        self.head = nn.Linear(width, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the first weights, also after ``to_empty`` of a model made without memory."""
        for linear in (self.pool, self.head):
            if linear is not None:
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Class logits (B, C) of tokens (B, N, D), in the type of the weights, autocast or not.

        It is so small that casts would be most of its cost, and tau is compared with its loss.
        """
        with without_autocast(tokens.device.type):
            tokens = tokens.to(self.head.weight.dtype)
            if self.pool is not None:
                weight = self.pool(tokens).softmax(dim=1)  # (B, N, 1)
                pooled = torch.einsum("bnk,bnd->bd", weight, tokens)
            elif self.pooling == "cls":
                pooled = tokens[:, 0]
            else:
                pooled = tokens[:, self.num_prefix_tokens :].mean(dim=1)
            return self.head(pooled)

    def extra_repr(self) -> str:
        """Name the pooling."""
        return f"pooling={self.pooling!r}"
