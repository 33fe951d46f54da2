"""TokenMixup in the direct formulation: the yardstick for the library's speed.

It follows the method's equations and shares no code with `tokenmixup`: the gain matrix by
broadcasting, SciPy's assignment, attention that stores its whole map, a second full attention for
the saliency, and masked indexing for the mixing. Only this folder and its tests use it.

Dimensions: B batch, N tokens, P prefix tokens, T = N - P patch tokens, D width, H heads, d head
width, C classes, E easy samples.
"""

from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from tokenmixup import TokenMixupModel, TokenMixupOutput


def saliency_gain(saliency: Tensor, easy: Tensor, rho: float) -> Tensor:
    """(B, T), (B,) -> (E, B), with (E, B, T) temporaries."""
    difference = saliency.unsqueeze(0) - saliency[easy].unsqueeze(1) - rho  # (E, B, T)
    return F.relu(difference).sum(-1)


def assign_partners(gain: Tensor) -> Tensor:
    """(E, B) -> (E,), by SciPy."""
    _, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(gain.device)


def pairing(saliency: Tensor, easy: Tensor, rho: float) -> Tensor:
    """(B, T), (B,) -> the partner of each easy sample, (E,)."""
    return assign_partners(saliency_gain(saliency, easy, rho))


def horizontal_mixup(
    tokens: Tensor, targets: Tensor, saliency: Tensor, easy: Tensor, rho: float, prefix: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed tokens (B, N, D), mixed targets (B, C) and mask (B, T), in batch order."""
    rows = easy.nonzero().squeeze(1)  # (E,)
    partner = pairing(saliency, easy, rho)  # (E,)
    own, other = saliency[rows], saliency[partner]  # (E, T)
    mask = other - own > rho
    patches = tokens[rows, prefix:].clone()
    patches[mask] = tokens[partner, prefix:][mask]
    mixed_tokens = tokens.clone()
    mixed_tokens[rows, prefix:] = patches
    kept, taken = (own * ~mask).sum(1), (other * mask).sum(1)
    share = (taken / (kept + taken)).unsqueeze(1)
    mixed_targets = targets.clone()
    mixed_targets[rows] = (1 - share) * targets[rows] + share * targets[partner]
    whole = torch.zeros_like(saliency, dtype=torch.bool)
    whole[rows] = mask
    return mixed_tokens, mixed_targets, whole


def attention(attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, N, D) and map (B, H, N, N) of attention with one projection, on normed tokens."""
    heads = attn.num_heads
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, N, d)
        for part in attn.qkv(tokens).chunk(3, dim=-1)
    )
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    probabilities = scores.softmax(-1)
    joined = (attn.attn_drop(probabilities) @ value).transpose(1, 2).flatten(2)
    return attn.proj_drop(attn.proj(joined)), probabilities


class DirectModel(nn.Module):
    """A host with HTM in the direct form: this project's CCT or timm's ViT.

    It takes over the parameters of a `TokenMixupModel`, which must not be used any more, and
    returns what that model returns in training.
    """

    def __init__(self, model: TokenMixupModel) -> None:
        super().__init__()
        assert model.horizontal is not None and model.vertical is None
        self.horizontal = model.horizontal
        self.class_token = model.layout.class_token
        self.prefix = model.layout.num_prefix_tokens
        self.scorenets = model.scorenets
        self.enabled = True  # as the training step asks of a TokenMixupModel
        self.backbone: Any = model.detach()
        self.is_cct = type(self.backbone).__name__ == "CCT"

    def forward(self, images: Tensor, targets: Tensor) -> TokenMixupOutput:
        host = self.backbone
        if self.is_cct:
            tokens = host.pos_drop(host.tokenizer(images) + host.pos_embed)
        else:
            tokens = host.norm_pre(host._pos_embed(host.patch_embed(images)))
        loss, stats = tokens.new_zeros(()), {}
        for index, block in enumerate(host.blocks):
            if index in self.horizontal.layers:
                tokens, targets, more, mask = self._mix(index, block, tokens, targets)
                loss = loss + more
                stats[f"htm/layer{index}/mixed_share"] = mask.any(1).float().mean()
            tokens = self._block(block, tokens)
        logits = host.forward_head(host.norm(tokens))
        return TokenMixupOutput(logits, targets, loss, stats)

    def _block(self, block: Any, tokens: Tensor) -> Tensor:
        out, _ = attention(block.attn, block.norm1(tokens))
        if self.is_cct:
            tokens = block.norm2(tokens + block.drop_path(out))
            return tokens + block.drop_path(block.mlp(tokens))
        tokens = tokens + block.drop_path1(block.ls1(out))
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

    def _mix(
        self, index: int, block: Any, tokens: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        config = self.horizontal
        assert config.tau is not None
        net = self.scorenets[str(index)]
        logits = net(tokens.detach() if config.scorenet_stop_gradient else tokens)
        losses = -(targets * logits.log_softmax(-1)).sum(-1)  # (B,)
        with torch.no_grad():
            easy = losses / 10 <= config.tau
            _, probabilities = attention(block.attn, block.norm1(tokens))  # the second one
            rows = probabilities[:, :, :1] if self.class_token else probabilities
            saliency = rows.mean((1, 2))[:, self.prefix :]  # (B, T)
        tokens, targets, mask = horizontal_mixup(
            tokens, targets, saliency, easy, config.rho, self.prefix
        )
        return tokens, targets, config.scorenet_lambda * losses.mean(), mask
