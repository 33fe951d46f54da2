"""TokenMixup in your own encoder, with the two wrapper layers: `examples/custom_encoder.py`.

The interface is that of the paper's repository. The encoder needs an attention that returns its
map, and layers that are called as `layer(x, y)` and have a method `get_attention_map(x, y)`.
"""

import torch
import torch.nn.functional as F
from digits import batches, digits
from torch import Tensor, nn

from tokenmixup import HorizontalTokenMixupLayer, VerticalTokenMixupLayer
from tokenmixup.functional import soft_cross_entropy

WIDTH, HEADS, DEPTH, CLASSES = 64, 4, 4, 10


class Attention(nn.Module):
    """Self-attention that returns (output, attention map)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        return self.proj((attention @ value).transpose(1, 2).flatten(2)), attention


class EncoderLayer(nn.Module):
    """A pre-norm layer that returns the targets y unchanged."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = attention
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x, y):
        x = x + self.attention(self.norm1(x))[0]
        return x + self.mlp(self.norm2(x)), y

    def get_attention_map(self, x: Tensor, y) -> Tensor:
        return self.attention(self.norm1(x))[1]


class Encoder(nn.Module):
    """HTM in layer 1, VTM in layer 2."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, kernel_size=2, stride=2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 17, WIDTH) * 0.02)
        self.layers = nn.ModuleList()
        for index in range(DEPTH):
            attention = VerticalTokenMixupLayer(
                Attention(),
                layer_index=index,
                apply_layers=[2],
                kappa=4,
                vtm_attn_dim=WIDTH,
                vtm_attn_numheads=HEADS,
            )
            layer = EncoderLayer(attention)
            if index == 1:
                layer = HorizontalTokenMixupLayer(
                    layer, tau=0.05, rho=0.005, d_model=WIDTH, num_classes=CLASSES
                )
            self.layers.append(layer)
        self.vertical = attention  # any of them: they share the remembered tokens
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images, y=None):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x), dim=1) + self.positions
        for layer in self.layers:
            x, y = layer(x, y)
        self.vertical.reset()  # frees the remembered tokens now, not at the next step
        return self.head(self.norm(x[:, 0])), y


torch.manual_seed(0)
train_images, train_labels, test_images, test_labels = digits()
model = Encoder().train()
optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
for images, labels in batches(train_images, train_labels, epochs=8):
    logits, (targets, scorenet_loss) = model(images, F.one_hot(labels, CLASSES).float())
    loss = soft_cross_entropy(logits, targets).mean() + scorenet_loss.mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

model.eval()
with torch.no_grad():
    accuracy = (model(test_images)[0].argmax(1) == test_labels).float().mean()
print(f"test accuracy {accuracy:.3f}")
