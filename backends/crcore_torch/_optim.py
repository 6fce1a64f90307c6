"""Optimizer groups that treat quantizer scales as they must be treated."""

from __future__ import annotations

from typing import Any

from torch import nn

from crcore_torch._fake_quantize import FakeQuantize


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, quantizer_lr_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: no weight decay on quantizer parameters, and a learning rate of their own.

    Weight decay pulls a scale towards zero, and with it the range that the layer can represent. Plain
    ``student.parameters()`` is fine for an optimizer without weight decay.

    Args:
        model: a prepared model.
        lr: learning rate of the network's parameters.
        weight_decay: of the network's parameters.
        quantizer_lr_multiplier: the scales' learning rate over ``lr``.

    >>> import crcore, torch
    >>> from crcore_torch import prepare
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
    >>> student = prepare(net, crcore.Recipe(crcore.LSQ(bits=4), crcore.LSQ(bits=4)))
    >>> optimizer = torch.optim.SGD(parameter_groups(student, lr=0.01, weight_decay=1e-4), momentum=0.9)
    >>> [group["weight_decay"] for group in optimizer.param_groups]
    [0.0001, 0.0]
    """
    quantizer = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, FakeQuantize)
        for parameter in module.parameters(recurse=False)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in trained if id(parameter) not in quantizer],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "params": [parameter for parameter in trained if id(parameter) in quantizer],
            "lr": lr * quantizer_lr_multiplier,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
