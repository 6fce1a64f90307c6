"""Networks that other people wrote: `transformers` models from their configuration, small, with random weights."""

from __future__ import annotations

import re

import crcore_torch as crt
import pytest
import torch
import torch.nn.functional as F
from small_nets import CONSISTENCY, assert_same_bits, snapshot
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import crcore as cr


def pixels(seed: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


def tokens(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 60, (4, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill_(1, torch.tensor([6]), 0)}


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "ResNet": (
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
        ),
        pixels,
        7,
    ),
    "MobileNetV2": (
        lambda: MobileNetV2ForImageClassification(
            MobileNetV2Config(image_size=32, depth_multiplier=0.25, min_depth=4, depth_divisible_by=4, num_labels=3)
        ),
        pixels,
        40,
    ),
    "ViT": (
        lambda: ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=3)),
        pixels,
        12,
    ),
    "BERT": (
        lambda: BertForSequenceClassification(
            BertConfig(**SMALL, vocab_size=60, max_position_embeddings=16, num_labels=3)
        ),
        tokens,
        14,
    ),
}


def prepared(model: torch.nn.Module) -> torch.nn.Module:
    """As a user does it: what cannot be quantized is left out as the message says."""
    chosen = {"weights": cr.LSQ(4, per_channel=True), "activations": cr.LSQ(4)}
    try:
        return crt.prepare(model, cr.Recipe(**chosen))
    except cr.CRCoreError as error:
        skip = eval(re.search(r"skip=(\(.*?\))\)", str(error))[1], {})
        return crt.prepare(model, cr.Recipe(**chosen, skip=skip))


@pytest.mark.parametrize("name", MODELS)
def test_prepare_train_save_and_convert(name):
    make, batch, at_least = MODELS[name]
    model = make()
    student = prepared(model)
    assert sum(hasattr(m, "weight_quantizer") for m in student.modules()) >= at_least
    assert model.state_dict().keys() <= student.state_dict().keys()

    teacher = crt.Teacher(student, cr.EMA(0.5))
    consistency = crt.ConsistencyLoss(CONSISTENCY)
    optimizer = torch.optim.SGD(crt.parameter_groups(student.train(), lr=0.05), momentum=0.9)
    teacher.follow(optimizer)
    labels = torch.tensor([0, 1, 2, 0])
    before = snapshot(teacher)
    for step in range(2):
        logits = student(**batch(step)).logits
        target = teacher(**batch(step)).logits
        loss = F.cross_entropy(logits, labels) + consistency(logits, target, step=teacher.step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert teacher.step == 2
    without = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None and "pooler" not in n]
    assert not without
    assert not snapshot(teacher).keys() ^ before.keys()

    fresh = prepared(make())
    fresh.load_state_dict(student.state_dict())
    assert_same_bits(snapshot(student), snapshot(fresh))
    with torch.no_grad():
        x = batch(9)
        expected = student.eval()(**x).logits
        assert torch.equal(fresh.eval()(**x).logits, expected)
        assert torch.equal(crt.convert(student)(**x).logits, expected)
        assert torch.equal(crt.convert(teacher)(**x).logits, teacher(**x).logits)
