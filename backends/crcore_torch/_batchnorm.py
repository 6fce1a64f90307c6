"""BatchNorm's running statistics, measured anew for the weights that a network has now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crcore import CRCoreError


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set BatchNorm's running statistics to their mean over ``batches``, through the model as it is now.

        running_mean = mean over batches of mean(x),   running_var = mean over batches of var(x)

    with each batch's own mean and unbiased variance, which normalize it in the layers behind, too. Running statistics
    lag behind the weights, and an average of weights has some that no student had: stochastic weight averaging measures
    them after training (Izmailov et al., 2018, arXiv 1803.05407, section 3). ``torch.optim.swa_utils.update_bn`` takes
    the same means, but puts the whole model in train mode, in which quantizers observe and dropout drops. Here
    BatchNorm alone is; nothing but its running statistics changes. Layers that no batch reaches keep theirs.

    Args:
        model: a student, a ``Teacher``, its ``model``, or a float network.
        batches: inputs as in training, on the model's device; or tuples that begin with them, as a loader yields.

    Raises:
        CRCoreError: the model has no BatchNorm with running statistics, or there is no batch. After an error the
            statistics are what they were.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.BatchNorm1d(1)).eval()
    >>> reestimate_batchnorm(net, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])])
    >>> net[0].running_mean, net[0].running_var
    (tensor([3.5000]), tensor([5.]))
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        raise CRCoreError(
            f"reestimate_batchnorm: {type(model).__name__} has no BatchNorm with running statistics; leave the call out"
        )
    if isinstance(batches, Tensor):
        raise CRCoreError(
            f"reestimate_batchnorm takes batches, got one tensor of shape {tuple(batches.shape)}; give a list of "
            "batches or a loader"
        )
    modes = [(module, module.training) for module in model.modules()]
    before = [(norm, norm.momentum, [buffer.clone() for buffer in norm.buffers(recurse=False)]) for norm in norms]
    measured = False
    try:
        for module, _ in modes:
            module.training = False
        for norm in norms:
            norm.training = True
            norm.momentum = None  # torch's word for a cumulative average
            norm.reset_running_stats()
        for batch in batches:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
            measured = True
        if not measured:
            raise CRCoreError("reestimate_batchnorm: there is no batch; give one at least (is the loader used up?)")
    except BaseException:
        measured = False
        raise
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum, statistics in before:
            norm.momentum = momentum
            if not measured or not norm.num_batches_tracked:
                for buffer, value in zip(norm.buffers(recurse=False), statistics, strict=True):
                    buffer.copy_(value)
