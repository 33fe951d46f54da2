"""TokenMixup on a timm model, in ten lines: `python examples/timm_ten_lines.py`."""

import timm
import torch
from digits import batches, digits

from tokenmixup import HorizontalConfig, VerticalConfig, attach

torch.manual_seed(0)
train_images, train_labels, test_images, test_labels = digits()
small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}

# The ten lines
host = timm.create_model("vit_tiny_patch16_224", num_classes=10, **small)
horizontal = HorizontalConfig(layers=(1,), tau=0.05, rho=0.005)
vertical = VerticalConfig(layers=(2,), kappa=4)
model = attach(host, horizontal=horizontal, vertical=vertical).train()
optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
for images, labels in batches(train_images, train_labels, epochs=8):
    out = model(images, labels)
    loss = out.loss()
    optimiser.zero_grad(), loss.backward(), optimiser.step()
host = model.detach().eval()  # the plain timm model again, trained

for name, value in out.stats.items():
    print(f"{name:36} {value:.4f}")
with torch.no_grad():
    accuracy = (host(test_images).argmax(1) == test_labels).float().mean()
print(f"test accuracy {accuracy:.3f}")
