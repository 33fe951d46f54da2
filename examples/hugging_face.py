"""TokenMixup on a Hugging Face classifier: `python examples/hugging_face.py`.

Nothing is downloaded: the model is built from a config. `from_pretrained` works the same way.
"""

import tempfile

import torch
from digits import batches, digits
from transformers import ViTConfig, ViTForImageClassification

from tokenmixup import HorizontalConfig, attach

torch.manual_seed(0)
train_images, train_labels, test_images, test_labels = digits()
config = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    hidden_dropout_prob=0.1,
    num_labels=10,
)

model = attach(
    ViTForImageClassification(config),
    horizontal=HorizontalConfig(layers=(1,), tau=0.05, rho=0.005, scorenet="cls"),
)
model.train()
optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
for images, labels in batches(train_images, train_labels, epochs=8):
    out = model(images, labels)  # pixel values and labels
    loss = out.loss()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

host = model.detach().eval()  # the Hugging Face model again, without ScoreNet
with tempfile.TemporaryDirectory() as folder:
    host.save_pretrained(folder)
    host = ViTForImageClassification.from_pretrained(folder).eval()
with torch.no_grad():
    accuracy = (host(test_images).logits.argmax(1) == test_labels).float().mean()
print(f"mixed in the last batch: {out.stats['htm/layer1/easy_share']:.0%} of the images")
print(f"test accuracy {accuracy:.3f}")
