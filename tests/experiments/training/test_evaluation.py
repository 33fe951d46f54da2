"""The evaluation against a plain one written here."""

import pytest
import torch
from torch import nn

from experiments.errors import ConfigError
from experiments.training.distributed import ONE_PROCESS, World
from experiments.training.evaluation import Assessment, evaluate
from experiments.training.run import Run
from tests.helpers.runs_helper import small_config
from tests.helpers.waits import Waits


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


class Linear(nn.Linear):
    """Notes in which precision it computes."""

    def forward(self, images):
        logits = super().forward(images.flatten(1))
        cuda = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        self.seen = (logits.dtype, *cuda)
        return logits


@pytest.mark.parametrize(
    ("precision", "seen"),
    [
        ("fp32", (torch.float32, False, False)),
        ("tf32", (torch.float32, True, True)),
        ("bf16", (torch.bfloat16, False, False)),
    ],
)
def test_evaluation_computes_in_its_precision_and_leaves_that_of_others(tmp_path, precision, seen):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    assert before == (False, True), "what torch sets"
    model, config = Linear(12, 6), small_config(tmp_path, eval_precision=precision)
    batch = torch.randn(3, 3, 2, 2), torch.arange(3)
    evaluate(model, [batch], ONE_PROCESS, config)
    assert model.seen == seen
    with pytest.raises(IndexError):
        evaluate(model, [(batch[0], batch[1] + 9)], ONE_PROCESS, config)
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


def test_tf32_is_refused_where_there_is_none(tmp_path):
    config = small_config(tmp_path, eval_precision="tf32")
    message = r"^eval_precision: got 'tf32'; allowed on this device: fp32, bf16, fp16$"
    for make in (lambda: Run(config, ONE_PROCESS), lambda: Assessment(config, "x", ONE_PROCESS)):
        with pytest.raises(ConfigError, match=message):
            make()


def noise(device, count=3):
    images = torch.randn(4, 3, 2, 2, device=device)
    return [(images, torch.arange(4, device=device))] * count


def test_no_batch_makes_the_host_wait(tmp_path):
    with Waits() as waits:
        evaluate(Linear(12, 6), noise("cpu"), ONE_PROCESS, small_config(tmp_path))
    assert (waits.read, waits.sent) == (0, 0)


@pytest.mark.gpu
def test_no_batch_makes_the_host_wait_for_the_gpu(tmp_path):
    world = World(0, 1, torch.device("cuda"))
    model, config = Linear(12, 6).to("cuda"), small_config(tmp_path, device="cuda")

    def batches():
        torch.cuda.set_sync_debug_mode("error")
        yield from given
        torch.cuda.set_sync_debug_mode("default")

    given = noise("cuda")
    try:
        assert evaluate(model, batches(), world, config).images == 12
    finally:
        torch.cuda.set_sync_debug_mode("default")
