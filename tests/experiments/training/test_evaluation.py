"""The evaluation against a plain one written here."""

import pytest
import torch
from torch import nn

from experiments.training.distributed import ONE_PROCESS
from experiments.training.evaluation import evaluate
from tests.helpers.runs_helper import small_config


class Fixed(nn.Module):
    """Answers with given logits, one row per image."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.seen = logits, 0

    def forward(self, images):
        start, self.seen = self.seen, self.seen + len(images)
        return self.logits[start : self.seen]


@pytest.mark.parametrize("classes", [3, 10])
def test_evaluation_counts_each_image_once(tmp_path, classes):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(23, classes, generator=generator)
    labels = torch.randint(0, classes, (23,), generator=generator)
    batches = [(torch.zeros(len(part), 3, 2, 2), part) for part in labels.split(5)]
    model = Fixed(logits).train()
    result = evaluate(model, batches, ONE_PROCESS, small_config(tmp_path))
    order = logits.sort(1, descending=True).indices.tolist()
    truth = labels.tolist()
    top1 = sum(order[i][0] == truth[i] for i in range(23))
    top5 = sum(truth[i] in order[i][:5] for i in range(23))
    loss = sum(-logits[i].log_softmax(0)[truth[i]].item() for i in range(23)) / 23
    assert result.top1 == pytest.approx(100 * top1 / 23)
    assert result.top5 == pytest.approx(100 * top5 / 23)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.images == 23
    assert model.training
