"""CCT against a plain re-implementation of its equations, and under timm's interface."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config

import tokenmixup
from tokenmixup.models import CCT_NAMES
from tokenmixup.models.cct import Block, sinusoidal_embedding

SMALL = [name for name in CCT_NAMES if name.endswith(("_32", "_32_sine"))]


def naive_block(block, x):
    """The block's equations with an explicit attention map, one head at a time."""
    width = x.shape[-1]
    heads = block.attn.num_heads
    depth = width // heads
    normed = F.layer_norm(x, (width,), block.norm1.weight, block.norm1.bias, 1e-5)
    query, key, value = (normed @ block.attn.qkv.weight.T).split(width, dim=-1)
    outputs = []
    for h in range(heads):
        part = slice(h * depth, (h + 1) * depth)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(depth)
        outputs.append(scores.softmax(-1) @ value[..., part])
    attended = torch.cat(outputs, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
    x = F.layer_norm(x + attended, (width,), block.norm2.weight, block.norm2.bias, 1e-5)
    hidden = F.gelu(x @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def test_block_equals_its_equations():
    block = Block(12, heads=3, mlp_ratio=2, proj_drop=0.0, attn_drop=0.0, drop_path=0.0).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(block(x), naive_block(block, x), rtol=1e-10, atol=1e-10)


def test_model_equals_its_equations():
    model = timm.create_model("cct_4_3x2_32", num_classes=5).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = images
    for convolution in model.tokenizer.convolutions:
        x = F.max_pool2d(F.conv2d(x, convolution.weight, padding=1).relu(), 3, 2, 1)
    x = x.flatten(2).transpose(1, 2) + model.pos_embed
    for block in model.blocks:
        x = naive_block(block, x)
    x = F.layer_norm(x, x.shape[-1:], model.norm.weight, model.norm.bias, 1e-5)
    weight = (x @ model.pool.weight.T + model.pool.bias).softmax(1)
    logits = (weight * x).sum(1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), logits, rtol=1e-10, atol=1e-10)


def test_attention_to_memory_equals_attention_over_the_longer_sequence():
    block = Block(12, heads=3, mlp_ratio=2, proj_drop=0.0, attn_drop=0.0, drop_path=0.0).double()
    x, memory = torch.randn(2, 7, 12).double(), torch.randn(2, 4, 12).double()
    whole = block.attn(torch.cat((x, memory), dim=1))[:, :7]
    torch.testing.assert_close(block.attn(x, memory=memory), whole, rtol=1e-12, atol=1e-12)


def test_parameter_counts():
    plain = timm.create_model("cct_7_3x1_32", num_classes=10)
    assert plain.num_tokens == 256
    assert sum(p.numel() for p in plain.parameters()) == 3_760_139
    horizontal = tokenmixup.HorizontalConfig(layers=(2,), tau=0.1, rho=0.003)
    model = tokenmixup.attach(plain, horizontal=horizontal)
    assert sum(p.numel() for p in model.parameters()) == 3_762_966  # the published count


@pytest.mark.parametrize("name", SMALL)
def test_every_small_model_learns_in_every_parameter(name):
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.1, attn_drop_rate=0.1)
    model.train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert ("pos_embed" in dict(model.named_parameters())) != name.endswith("_sine")


@pytest.mark.parametrize("name", [name for name in CCT_NAMES if name not in SMALL])
def test_every_large_model_runs(name):
    model = timm.create_model(name, num_classes=3).eval()
    size = resolve_data_config({}, model=model)["input_size"]
    with torch.no_grad():
        assert model(torch.zeros(1, *size)).shape == (1, 3)
    assert size[1] == int(name.removesuffix("_sine").rsplit("_", 1)[1])


def test_sine_embedding_is_fixed_and_known():
    table = sinusoidal_embedding(5, 6)[0]
    for position in range(5):
        for channel in range(6):
            angle = position / 10_000 ** (2 * (channel // 2) / 6)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert table[position, channel].item() == pytest.approx(expected, abs=1e-6)
    model = timm.create_model("cct_2_3x2_32_sine")
    assert "pos_embed" not in model.state_dict()


def test_drop_path_rises_linearly():
    model = timm.create_model("cct_7_3x1_32", drop_path_rate=0.1)
    rates = [block.drop_path.drop_prob for block in model.blocks]
    assert rates == pytest.approx([0.1 * layer / 6 for layer in range(7)])


def test_every_rate_reaches_its_dropout():
    rates = {"drop_rate": 0.1, "pos_drop_rate": 0.2, "proj_drop_rate": 0.3, "attn_drop_rate": 0.4}
    model = timm.create_model("cct_2_3x2_32", num_classes=5, **rates)
    assert (model.head_drop.p, model.pos_drop.p) == (0.1, 0.2)
    for block in model.blocks:
        dropouts = (block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2, block.attn.attn_drop)
        assert [dropout.p for dropout in dropouts] == [0.3, 0.3, 0.3, 0.4]
    attention, x = model.blocks[0].attn, torch.randn(1, 9, 128)
    attention.proj_drop.eval()
    assert not torch.equal(attention(x), attention(x))
    assert torch.equal(attention.eval()(x), attention(x))


def test_checkpointing_runs_each_block_again():
    model = timm.create_model("cct_4_3x2_32", num_classes=5)
    model.set_grad_checkpointing()
    calls = []
    for number, block in enumerate(model.blocks):
        block.norm1.register_forward_hook(lambda *_, number=number: calls.append(number))
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert calls == [0, 1, 2, 3, 3, 2, 1, 0]
    model.set_grad_checkpointing(False)
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert calls[8:] == [0, 1, 2, 3]


def test_initialisation():
    model = timm.create_model("cct_7_3x1_32")
    assert model.pos_embed.std().item() == pytest.approx(0.2, rel=0.02)
    for name, parameter in model.named_parameters():
        if "attn" in name and name.endswith("weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        if name.endswith("bias"):
            assert not parameter.any(), name
    convolution = model.tokenizer.convolutions[0].weight
    assert convolution.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.05)


def test_classifier_interface():
    model = timm.create_model("cct_2_3x2_32", num_classes=0)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 128)
    model.reset_classifier(4)
    assert model.get_classifier().out_features == 4 and model.num_classes == 4
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not model.head.bias.any()
    tokens = torch.randn(2, 9, 128)
    pooled = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(pooled[0], model.pool(tokens[0]).softmax(0)[:, 0] @ tokens[0])
    torch.testing.assert_close(model.forward_head(tokens), model.head(pooled))
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(4, global_pool="avg")


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"gives? 16: set img_size|give 16: set img_size"):
        timm.create_model("cct_2_3x2_32")(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="pos_embed must be 'learn' or 'sine', got 'cosine'"):
        timm.create_model("cct_2_3x2_32", pos_embed="cosine")
    with pytest.raises(ValueError, match="128 is no multiple of num_heads 3"):
        timm.create_model("cct_2_3x2_32", num_heads=3)
    with pytest.raises(RuntimeError, match="retrained"):
        timm.create_model("cct_2_3x2_32", pretrained=True)
