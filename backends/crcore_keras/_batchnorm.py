"""BatchNormalization's moving statistics, measured anew for the weights that a network has now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
from keras import ops

from crcore import CRCoreError
from crcore_keras._tree import walk


def reestimate_batchnorm(model: Any, batches: Iterable[Any]) -> None:
    """Set BatchNormalization's moving statistics to their mean over ``batches``, through the model as it is now.

        moving_mean = mean over batches of mean(x),   moving_variance = mean over batches of var(x)

    with each batch's own mean and biased variance, which normalize it in the layers behind, too. Moving statistics lag
    behind the weights, and an average of weights has some that no student had: stochastic weight averaging measures
    them after training (Izmailov et al., 2018, arXiv 1803.05407, section 3). All other layers are in inference mode:
    quantizers do not observe, dropout does not drop. Nothing but the statistics changes; layers that no batch reaches
    keep theirs. The model runs eagerly.

    In a callback, and after ``train_on_batch``, call ``ConsistencyModel.update_teacher()`` first: an update that is due
    would change the average's statistics again. ``fit`` ends with it.

    Args:
        model: a model from `prepare`, a ``ConsistencyModel`` (then it is its student), its ``teacher``, or a float
            model.
        batches: inputs as in training; or tuples ``(x, y)`` or ``(x, y, sample_weight)``, as data for ``fit`` yield.

    Raises:
        CRCoreError: the model has no BatchNormalization, one with ``renorm``, or there is no batch. After an error the
            statistics are what they were.

    >>> import keras, numpy as np
    >>> net = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization()])
    >>> reestimate_batchnorm(net, [np.array([[0.0], [2.0]]), np.array([[4.0], [8.0]])])
    >>> [float(statistic[0]) for statistic in (net.layers[0].moving_mean, net.layers[0].moving_variance)]
    [3.5, 2.5]
    """
    norms = {name: layer for name, layer in walk(model) if isinstance(layer, keras.layers.BatchNormalization)}
    if not norms:
        raise CRCoreError(f"reestimate_batchnorm: {model.name!r} has no BatchNormalization; leave the call out")
    for name, norm in norms.items():
        if getattr(norm, "renorm", False):
            raise CRCoreError(
                f"reestimate_batchnorm: layer {name!r} has renorm=True, whose statistics are no plain means; "
                "leave the call out"
            )
    if hasattr(batches, "shape"):
        raise CRCoreError(
            f"reestimate_batchnorm takes batches, got one array of shape {tuple(batches.shape)}; give a list of batches"
        )
    with ExitStack() as measuring:
        for norm in norms.values():
            measuring.enter_context(_measured(norm))
        count = 0
        for batch in batches:
            model(keras.utils.unpack_x_y_sample_weight(batch)[0], training=False)
            count += 1
        if not count:
            raise CRCoreError("reestimate_batchnorm: there is no batch; give one at least (are the data used up?)")


@contextmanager
def _measured(norm: Any) -> Iterator[None]:
    """The layer in training, whatever mode its model runs in, with the momentum that makes a cumulative mean."""
    call, momentum, trainable = norm.call, norm.momentum, norm.trainable
    statistics = (norm.moving_mean, norm.moving_variance)
    before = [ops.copy(statistic) for statistic in statistics]
    calls = 0

    def measure(inputs: Any, **options: Any) -> Any:
        nonlocal calls
        if not calls:  # a momentum of zero would not forget infinities
            for statistic in statistics:
                statistic.assign(ops.zeros(statistic.shape, statistic.dtype))
        calls += 1
        norm.momentum = (calls - 1) / calls
        return call(inputs, **(options | {"training": True}))

    norm.call = measure
    norm.trainable = True  # where it is frozen, as in a teacher, it does not train
    try:
        yield
    except BaseException:
        for statistic, value in zip(statistics, before, strict=True):
            statistic.assign(value)
        raise
    finally:
        del norm.call
        norm.momentum, norm.trainable = momentum, trainable
