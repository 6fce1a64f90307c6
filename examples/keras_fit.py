"""Quantization-aware training with consistency regularization, through Keras' fit().

Trains a small 4-bit network on scikit-learn's handwritten digits with 400 labels and 600 images without a label, and
prints the test accuracy of the student, of its teacher, and of the integer form. Runs on the engine that KERAS_BACKEND
names: tensorflow, jax or torch. Needs `pip install crcore[keras] scikit-learn` and that engine; a minute on a CPU.
"""

import crcore_keras as crk
import keras
from keras import layers
from sklearn.datasets import load_digits

import crcore as cr

EPOCHS = 15

keras.utils.set_random_seed(0)
digits = load_digits()
x, y = digits.images.astype("float32")[..., None] / 16.0, digits.target  # [N, 8, 8, 1], in [0, 1]
order = keras.ops.convert_to_numpy(keras.random.shuffle(keras.ops.arange(len(x)), seed=0))
train, unlabeled, test = order[:400], order[400:1000], order[1000:]


def conv_bn_relu(x, filters, strides=1):
    x = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
    return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))


inputs = keras.Input((8, 8, 1))
features = conv_bn_relu(conv_bn_relu(conv_bn_relu(inputs, 16), 32, strides=2), 32)
net = keras.Model(inputs, layers.Dense(10)(layers.Flatten()(layers.AveragePooling2D(2)(features))))
augment = keras.Sequential([layers.RandomTranslation(0.12, 0.12, fill_mode="constant"), layers.GaussianNoise(0.05)])

recipe = cr.Recipe(
    weights=cr.LSQ(bits=4, per_channel=True),
    activations=cr.LSQ(bits=4),
    consistency=cr.Consistency(cr.kl_divergence, weight=cr.sigmoid_ramp(1.0, steps=60)),
    ema=cr.EMA(decay=0.95, warmup=60),
)
model = crk.ConsistencyModel(crk.prepare(net, recipe), recipe, augment=augment)
model.compile(
    keras.optimizers.SGD(0.02, momentum=0.9),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(
    x[train],
    y[train],
    batch_size=50,
    epochs=EPOCHS,
    unlabeled=x[unlabeled],
    validation_data=(x[test], y[test]),
    callbacks=[crk.ConsistencyCallback(evaluate="teacher")],
    verbose=2,
)

deployed = crk.convert(model)  # integers, scales, zero points
for name, network in (("student", model), ("teacher", model.teacher), ("deployed", deployed)):
    accuracy = (network.predict(x[test], verbose=0).argmax(axis=-1) == y[test]).mean()
    print(f"{name}: {100.0 * accuracy:.1f} % of the test images")
