"""ViT, DeiT and DINOv2 classifiers of Hugging Face's `transformers` (version 5 and later).

Dimensions: B batch, N tokens, D width, H heads, M remembered tokens.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    HostAdapter,
    Kwargs,
    Remembered,
    TokenLayout,
    UnsupportedHostError,
    linear_outputs,
    project,
    refuse_masks,
    require_part,
    split_heads,
)

IMPLEMENTATIONS = ("eager", "sdpa")
"""Attention implementations that the tests cover."""
TRAINER = MappingProxyType(
    {
        "accepts_loss_kwargs": (
            "the Trainer of transformers would save the model with TokenMixup under keys that "
            "from_pretrained does not know, and from_pretrained would then return random weights: "
            "use tokenmixup.integrations.transformers.TokenMixupTrainer, or derive your own from it"
        )
    }
)
"""What a Trainer reads when it is made. Only `TokenMixupTrainer` answers."""
ARGUMENTS = ("hidden_states", "attention_mask")
"""Of layers and of their attention."""
READ = ("num_attention_heads", "scaling")
"""Attributes of the attention besides its projections."""


class TransformersViT(HostAdapter):
    """`ViTForImageClassification`: a class token, then the patches.

    Before version 5.9 (Dinov2 before 5.18) a layer's attention has the module that projects and
    attends inside it, with other names, and the layers are those of an encoder inside the model.
    """

    family = "transformers ViTForImageClassification"
    host_classes = ("transformers.models.vit.modeling_vit.ViTForImageClassification",)
    layer_class: ClassVar[str] = "transformers.models.vit.modeling_vit.ViTLayer"
    attention_class: ClassVar[str] = "transformers.models.vit.modeling_vit.ViTAttention"
    norm: ClassVar[str] = "layernorm_before"
    num_prefix_tokens: ClassVar[int] = 1
    refused = TRAINER

    def encoder(self, host: nn.Module) -> nn.Module:
        """The model without its classifier."""
        return cast(Any, host).vit

    def check(self, host: nn.Module) -> None:
        """Layers with separate projections, and an implementation that the tests cover."""
        check_implementation(self.family, host)
        for index, layer in enumerate(self.layers(host)):
            where = f"layers[{index}]"
            require_part(layer, where, (self.layer_class,), (self.norm, "attention"), ARGUMENTS)
            attention = self.attention(layer)
            inner = self.attention_class.replace("Attention", "SelfAttention")
            classes, names = (self.attention_class, inner), (*_projections(attention), *READ)
            require_part(attention, f"{where}.attention", classes, names, ARGUMENTS)

    def layers(self, host: nn.Module) -> Sequence[nn.Module]:
        """The encoder's layers."""
        encoder: Any = self.encoder(host)
        return list(encoder.layers if "layers" in encoder._modules else encoder.encoder.layer)

    def layout(self, host: nn.Module) -> TokenLayout:
        """From the host's config."""
        return TokenLayout(
            width=cast(Any, host).config.hidden_size,
            num_prefix_tokens=self.num_prefix_tokens,
            class_token=True,
            num_patch_tokens=self.num_patch_tokens(host),
            num_classes=linear_outputs(cast(Any, host).classifier),
        )

    def num_patch_tokens(self, host: nn.Module) -> int | None:
        """T: images have one size unless `interpolate_pos_encoding` is set."""
        return cast(Any, self.encoder(host)).embeddings.patch_embeddings.num_patches

    def attention(self, layer: nn.Module) -> nn.Module:
        """The module that projects and attends."""
        attention: Any = cast(Any, layer).attention
        return attention.attention if "attention" in attention._modules else attention

    def normalise(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """The layer's first norm."""
        return getattr(layer, self.norm)(tokens)

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """From the separate projections."""
        refuse_masks(args, kwargs, attention_mask=1)
        attention: Any = self.attention(layer)
        to_query, to_key = (getattr(attention, name) for name in _projections(attention))
        tokens = self.normalise(layer, tokens)
        query = project(to_query, tokens, class_row)
        key = project(to_key, tokens)
        heads = attention.num_attention_heads
        return split_heads(query, heads), split_heads(key, heads), attention.scaling

    def with_memory(
        self, layer: nn.Module, remembered: Remembered, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Remembered tokens follow the layer's own."""
        refuse_masks(args, kwargs, attention_mask=1)
        return super().with_memory(layer, remembered, args, kwargs)

    def own_tokens(
        self, layer: nn.Module, remembered: Remembered, output: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """The layer's own rows of the output, and of the attention map where there is one."""
        tokens, attention_map = output
        count = remembered.tokens.shape[1]
        if attention_map is not None:
            attention_map = attention_map[:, :, :-count]
        return tokens[:, :-count], attention_map

    def logits(self, output: Any) -> Tensor:
        """The output's `logits`."""
        return output.logits


class TransformersDeiT(TransformersViT):
    """`DeiTForImageClassification`: a class and a distillation token, then the patches."""

    family = "transformers DeiTForImageClassification"
    host_classes = ("transformers.models.deit.modeling_deit.DeiTForImageClassification",)
    layer_class = "transformers.models.deit.modeling_deit.DeiTLayer"
    attention_class = "transformers.models.deit.modeling_deit.DeiTAttention"
    num_prefix_tokens = 2

    def encoder(self, host: nn.Module) -> nn.Module:
        """The model without its classifier."""
        return cast(Any, host).deit


class TransformersDinov2(TransformersViT):
    """`Dinov2ForImageClassification`: a class token, then the patches of images of any size."""

    family = "transformers Dinov2ForImageClassification"
    host_classes = ("transformers.models.dinov2.modeling_dinov2.Dinov2ForImageClassification",)
    layer_class = "transformers.models.dinov2.modeling_dinov2.Dinov2Layer"
    attention_class = "transformers.models.dinov2.modeling_dinov2.Dinov2Attention"
    norm = "norm1"

    def encoder(self, host: nn.Module) -> nn.Module:
        """The model without its classifier."""
        return cast(Any, host).dinov2

    def num_patch_tokens(self, host: nn.Module) -> int | None:
        """None: the host resizes its position embedding to any image."""
        return None


def check_implementation(family: str, host: nn.Module) -> None:
    """Raise `UnsupportedHostError` if the tests do not cover the host's attention."""
    implementation = cast(Any, host).config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedHostError(
            f"TokenMixup supports the attention implementations {', '.join(IMPLEMENTATIONS)} "
            f"of {family}, got {implementation!r}: "
            'host.set_attn_implementation("sdpa") sets it'
        )


def _projections(attention: nn.Module) -> tuple[str, str]:
    """The names of the projections to queries and keys."""
    return ("query", "key") if "query" in attention._modules else ("q_proj", "k_proj")
