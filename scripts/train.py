# Generated from notebooks/03_cnn_iterations.ipynb by `make scripts`: edit the notebook, not this file.
"""Trains a CNN from scratch on the training rows of FER2013 and saves it for the other scripts."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import csv
import importlib.util
import json
import shutil
import time

import cv2
import numpy as np

import utils

with utils.quiet_tensorflow():
    import keras
    from keras import layers

BASE = {
    "architecture": "plain", "epochs": 8, "augmentation": False, "erasing": 0.0, "mixup": 0.0,
    "label_smoothing": 0.0, "dropout": 0.2, "ema": 0.0, "strong_share": 1.0, "first_side": 32, "first_share": 1.0,
    "learning_rate": 0.06, "noise": 0.0, "sharp": False, "start": "", "beside": "", "teacher": 0.0, "taught_by": "",
    "cycles": 1, "ends_before": False, "clean_norms": False, "optimizer": "sgd", "frozen": "",
    "precision": "mixed_bfloat16", "validation_fraction": 0.1, "seed_offset": 0,
    "ranks": "", "view": 44,
}  # fmt: skip
CHANGES = {
    "plain": ({}, "The first CNN: three convolutions with max pooling, as for digits. It is the yardstick."),
    "vgg": (
        {"architecture": "vgg"},
        "Pairs of 3x3 convolutions, four times, with batch norm: deeper, and still easy to train.",
    ),
    "augmented": (
        {"augmentation": True},
        "The network before learns its training faces by heart. Mirrored, turned, shifted, scaled, darker and "
        "flatter faces cannot be learnt by heart.",
    ),
    "residual": (
        {"architecture": "residual"},
        "Shortcuts carry the gradient past each block, the stem keeps the full resolution, since a mouth has few "
        "pixels, and strides take the place of pooling.",
    ),
    "regularised": (
        {"erasing": 0.5, "mixup": 0.2, "label_smoothing": 0.05, "ema": 0.999, "strong_share": 0.8},
        "Many labels are doubtful, so the network should not be sure of any: mixup and label smoothing soften the "
        "targets, erasing hides a part of the face, and a moving average of the weights steadies them. The last fifth "
        "of the epochs goes without mixup and erasing, on faces as they are.",
    ),
    "long": (
        {"first_share": 0.6, "epochs": 74},
        "What is regularised learns slowly: nine times as many epochs, most of them with small faces and the last ones "
        "at the full resolution, which is nearly the price of the one and the detail of the other.",
    ),
    "grown": (
        {
            "architecture": "grown", "start": "long", "teacher": 0.4, "label_smoothing": 0.0, "noise": 0.3,
            "sharp": True, "epochs": 40, "learning_rate": 0.025, "strong_share": 0.7, "first_side": 36,
        },
        "From the weights of the run before, with a new learning rate to leave their valley: a block at the full "
        "resolution is put in, which starts as the identity; the targets are blended with what the network before "
        "said of each face, since many labels are doubtful; faces are warped more sharply, and some "
        "get the noise of a camera.",
    ),
    "cycles": (
        {
            "start": "grown", "teacher": 0.5, "first_side": 44, "first_share": 1.0, "epochs": 30, "cycles": 2,
            "clean_norms": True,
        },
        "On from there at the full resolution, in two cycles of the learning rate; the mean of the weights at their "
        "ends is kept. The batch norms get the statistics of faces as they are, since those of changed faces, seen in "
        "training, are others. What the network before says is said with such batch norms too, and has more weight.",
    ),
    "taught": (
        {
            "start": "cycles", "teacher": 0.7, "taught_by": "start pre_trained_model.pkl", "epochs": 39, "cycles": 3,
            "ends_before": True,
        },
        "On once more, in three cycles. The targets lean on two networks that err on different faces: the one before, "
        "and the pre-trained one of 04_transfer_learning; the cross-entropy of their average is lower than of either. "
        "The mean of the ends takes in those of the run before.",
    ),
    "final": (
        {
            "architecture": "pooled", "start": "", "beside": "taught", "teacher": 0.5, "epochs": 100, "cycles": 1,
            "learning_rate": 0.06, "strong_share": 0.8, "first_side": 32, "first_share": 0.6, "ends_before": False,
            "view": 48,
            "ranks": "stage3a 160 stage3b 96 stage3c 80 block4a 136 block4b 128 block5a 104 block5b 88",
        },
        "More training of the one network brought no more, so a second one of another kind, with max pooling and no "
        "shortcuts, is trained from random weights. Its targets lean on those before it. The two stand side by side as "
        "the columns of one network, whose logits are the mean of theirs: two that err on different faces may be right "
        "more often than either. In the end each wide 3x3 kernel is split into two, of half its rank or less, and the "
        "network sees whole faces, not just their middle.",
    ),
    "onward": (
        {
            "start": "final", "teacher": 0.7, "taught_by": "start beside", "epochs": 22, "cycles": 2,
            "learning_rate": 0.02, "strong_share": 0.6, "first_side": 44, "first_share": 1.0,
            "frozen": "stage2a_convolution", "precision": "float32", "ranks": "", "view": 44,
        },
        "The validation loss of the second column was still falling when its training stopped. It goes on at the full "
        "resolution, in two cycles of the learning rate, whose ends are averaged. Its targets lean on both columns. "
        "Its first two stages, which have a fortieth of its weights, stay as they are.",
    ),
    "refit_residual": (
        {
            "architecture": "grown", "start": "taught", "beside": "final", "teacher": 0.5, "epochs": 7, "cycles": 1,
            "learning_rate": 0.008, "frozen": "block2a_convolution", "validation_fraction": 0.03,
        },
        "What both columns have too little of is faces. Seven of ten validation faces, seen by no network so far, "
        "become training faces; three stay held out. The first column goes on from its weights of taught, at a low "
        "learning rate. Its targets are blended with what both columns say: of the new faces, too.",
    ),
    "refit_pooled": (
        {
            "architecture": "pooled", "start": "final", "beside": "taught", "epochs": 10,
            "frozen": "stage2a_convolution",
        },
        "The same for the second column, from its weights of final, beside the first one as it was.",
    ),
    "slim": (
        {
            "architecture": "slim", "start": "", "beside": "final", "taught_by": "taught pre_trained_model.pkl",
            "epochs": 100, "learning_rate": 0.06, "strong_share": 0.8, "first_side": 32, "first_share": 0.65,
            "frozen": "", "validation_fraction": 0.1, "seed_offset": 1,
        },
        "The residual column is the weaker one of the two and the slower one. A second column with max pooling takes "
        "its place, from other random weights, with fewer of them where the maps are smallest. Its targets are those "
        "that the column beside it had.",
    ),
}  # fmt: skip


def recipe_of(iteration):
    """Return the recipe of an iteration as a dictionary: BASE with all the changes up to it."""
    if iteration not in CHANGES:
        raise utils.InputError(f"iteration is {iteration!r}; expected one of {', '.join(CHANGES)}")
    recipe = dict(BASE)
    for name, (changes, _) in CHANGES.items():
        recipe |= changes
        if name == iteration:
            return recipe


def history_of(iteration):
    """Return the names of the iterations that one needs, each behind those that it needs itself, and its own.

    It may start from the weights of one, and have the network of one beside it.
    """
    recipe = recipe_of(iteration)
    needed = [name for before in (recipe["start"], recipe["beside"]) if before for name in history_of(before)]
    return list(dict.fromkeys([*needed, iteration]))


def folder_of(iteration):
    """Return the name of the folder in which an iteration is trained: that of the final one has the model's."""
    return utils.MODEL.stem if iteration == "final" else iteration


def check_arguments(epochs, batch_size, patience, validation_fraction, limit, seed):
    """Refuse arguments of a training that make no sense.

    Raises:
        InputError: one of them is out of its range.
    """
    if epochs < 0 or batch_size < 1 or patience < 1 or not 0 < validation_fraction < 1:
        raise utils.InputError(
            "expected epochs of 0 or more, batch_size and patience of 1 or more, validation_fraction between 0 and 1"
        )
    if limit < 0 or not 0 <= seed < 2**32:
        raise utils.InputError(f"limit is {limit} and seed {seed}; expected 0 or more")


def load_parts(data, limit, validation_fraction, seed):
    """Return the faces to train on and those to validate on, each a pair of (n, 48, 48) uint8 images and (n,) labels.

    Raises:
        InputError: there are no training rows, or too few to hold some out.
    """
    images, labels = utils.load_fer2013("train", data or None)
    if limit:
        images, labels = images[:limit], labels[:limit]
    parts = utils.split_validation(images, labels, validation_fraction, seed)
    if not all(len(part) for part in parts):
        raise utils.InputError(
            f"{len(images)} images are too few to hold out {validation_fraction:.0%}; expected a hundred or more"
        )
    print(f"{len(parts[0])} images to train on, {len(parts[1])} to validate on")
    return [(images[part], labels[part]) for part in parts]


VIEW = 44  # pixels of a face's 48 that the network looks at in training, from the middle


def look(images, side=VIEW):
    """Cut the middle 44 of 48 pixels out of (n, 48, 48) uint8 faces: (n, side, side, 1) float32, 0 to 255."""
    edge = (utils.SIDE - VIEW) // 2
    middle = images[:, edge:-edge, edge:-edge]
    if side != VIEW:
        middle = np.stack([cv2.resize(face, (side, side), interpolation=cv2.INTER_AREA) for face in middle])
    return middle[..., None].astype(np.float32)


def augment(image, side, erasing, rng, noise=0.0, sharp=False):
    """Return a randomly changed copy of a face, as the network looks at it.

    Args:
        image: (48, 48) uint8.
        side: of the result, in pixels.
        erasing: probability that a rectangle is painted over (Zhong et al. 2020, arXiv:1708.04896).
        rng: numpy Generator.
        noise: probability that the noise of a camera is added, of up to 8 grey values.
        sharp: whether the pixels are interpolated by cubics, which blur less than lines.

    Returns:
        (side, side) float32, 0 to 255.
    """
    centre, scale = (utils.SIDE - 1) / 2, side / VIEW
    matrix = cv2.getRotationMatrix2D((centre, centre), rng.uniform(-15, 15), rng.uniform(0.85, 1.2) * scale)
    matrix[:, 2] += (side - 1) / 2 - centre + rng.uniform(-4, 4, 2) * scale
    if rng.random() < 0.5:
        matrix = matrix @ np.array([[-1, 0, 2 * centre], [0, 1, 0], [0, 0, 1]])
    how = cv2.INTER_CUBIC if sharp else cv2.INTER_LINEAR
    face = cv2.warpAffine(image, matrix, (side, side), flags=how, borderMode=cv2.BORDER_REFLECT).astype(np.float32)
    mean = face.mean()
    face = np.clip((face - mean) * rng.uniform(0.75, 1.3) + mean + rng.normal(0, 15), 0, 255)
    if noise and rng.random() < noise:
        face = np.clip(face + rng.normal(0, rng.uniform(0, 8), face.shape), 0, 255).astype(np.float32)
    if rng.random() < erasing:
        area, ratio = rng.uniform(0.02, 0.2) * side**2, np.exp(rng.uniform(-1, 1))
        height, width = (np.minimum(np.sqrt([area * ratio, area / ratio]), side - 1)).astype(int)
        top, left = rng.integers(0, side - height), rng.integers(0, side - width)
        face[top : top + height, left : left + width] = rng.uniform(0, 255)
    return face


BATCH_OPTIONS = ("batch_size", "seed", "augmentation", "erasing", "mixup", "noise", "sharp")


class FaceBatches(keras.utils.PyDataset):
    """Batches of faces to train on, in an order and with changes that depend on the seed and the epoch alone.

    Each item is a pair: (b, side, side, 1) float32 images from 0 to 255, and (b, 7) float32 labels, one-hot or, with
    `mixup`, blended as the images are (Zhang et al. 2018, arXiv:1710.09412). From the epoch `calm` on, of every
    `period` epochs, there is neither mixup nor erasing, so that the end of the training sees faces as they are (He et
    al. 2019, arXiv:1909.09148).
    """

    def __init__(
        self, images, targets, side, batch_size, seed, augmentation=True, erasing=0.0, mixup=0.0, noise=0.0,
        sharp=False, calm=None, period=None,
    ):  # fmt: skip
        super().__init__(workers=1)
        self.images, self.side, self.batch_size, self.seed = images, side, batch_size, seed
        self.calm, self.period = calm, period
        self.augmentation, self.most_erasing, self.most_mixup = augmentation, erasing, mixup
        self.options = {"noise": noise, "sharp": sharp}
        self.targets = targets if targets.ndim == 2 else keras.utils.to_categorical(targets, len(utils.EMOTIONS))
        self.start_epoch(0)

    def start_epoch(self, epoch):
        self.epoch = epoch
        strong = self.calm is None or (epoch % self.period if self.period else epoch) < self.calm
        self.erasing, self.mixup = (self.most_erasing, self.most_mixup) if strong else (0.0, 0.0)
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))

    def __len__(self):
        return max(1, len(self.images) // self.batch_size)  # an incomplete batch waits for the next epoch's shuffle

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, self.epoch, index])
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        targets = self.targets[chosen]
        if self.augmentation:
            faces = np.stack([augment(self.images[i], self.side, self.erasing, rng, **self.options) for i in chosen])
            faces = faces[..., None]
        else:
            faces = look(self.images[chosen], self.side)
        if self.mixup:
            share = rng.beta(self.mixup, self.mixup, len(chosen)).astype(np.float32)[:, None]
            partner = rng.permutation(len(chosen))
            targets = share * targets + (1 - share) * targets[partner]
            share = share[..., None, None]
            faces = share * faces + (1 - share) * faces[partner]
        return faces.astype(np.float32), targets


class BatchNormalization(layers.BatchNormalization):
    """Keras' own, in one kernel of PyTorch or TensorFlow instead of several passes over the memory.

    The saved model has Keras' own layer. This one has its name, by which files of weights know a layer.
    """

    def call(self, inputs, training=None, mask=None):
        weights = self.gamma, self.beta
        training = training and self.trainable  # as Keras' own, which is frozen together with its weights
        if keras.backend.backend() == "torch":
            from torch.nn.functional import batch_norm

            values = [variable.value for variable in (self.moving_mean, self.moving_variance, *weights)]
            first = inputs.permute(0, 3, 1, 2)  # PyTorch wants the channels first; the memory stays as it is
            return batch_norm(first, *values, bool(training), 1 - self.momentum, self.epsilon).permute(0, 2, 3, 1)
        if keras.backend.backend() == "tensorflow" and training:
            from tensorflow.compat.v1.nn import fused_batch_norm

            outputs, mean, variance = fused_batch_norm(inputs, *weights, epsilon=self.epsilon)
            for average, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
                average.assign(average * self.momentum + new * (1 - self.momentum))
            return outputs
        return super().call(inputs, training=training, mask=mask)


def convolution(x, width, name, size=3, stride=1):
    """A convolution and its batch norm (Ioffe and Szegedy 2015, arXiv:1502.03167)."""
    x = layers.Conv2D(width, size, stride, padding="same", use_bias=False, name=f"{name}_convolution")(x)
    return layers.BatchNormalization(name=f"{name}_norm")(x)


def plain_features(x):
    """Three convolutions, each followed by max pooling."""
    for width in (32, 64, 128):
        x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    return x


def vgg_features(x):
    """Blocks of two 3x3 convolutions, then max pooling (Simonyan and Zisserman 2015, arXiv:1409.1556)."""
    for width in (32, 64, 128, 256):
        for place in "ab":
            x = layers.ReLU()(convolution(x, width, f"{width}{place}"))
        x = layers.MaxPooling2D()(x)
    return x


def residual_features(x, blocks=((64, 2), (128, 2), (128, 1), (256, 2), (256, 1))):
    """A stem that keeps the resolution, then residual blocks (He et al. 2016, arXiv:1512.03385).

    Each block has a width and a stride. One that changes neither can be put into a trained network: with its last batch
    norm's gamma at 0 it starts as the identity (Chen et al. 2016, Net2Net, arXiv:1511.05641), see `grow`.
    """
    x = layers.ReLU()(convolution(x, 32, "stem"))
    for place, (width, stride) in enumerate(blocks, start=6 - len(blocks)):
        shortcut = x
        x = layers.ReLU()(convolution(x, width, f"block{place}a", stride=stride))
        x = convolution(x, width, f"block{place}b")
        if shortcut.shape != x.shape:
            shortcut = convolution(shortcut, width, f"block{place}_shortcut", size=1, stride=stride)
        x = layers.ReLU()(layers.Add()([x, shortcut]))
    return x


def pooled_features(x, stages=((32, 2), (64, 2), (128, 3), (320, 3)), name="stage"):
    """Like `vgg_features`, with a third convolution where the maps are small, and wider at last.

    Each stage has a width and a number of convolutions. Its maps are as large as those of `residual_features`, which
    can stand beside them.
    """
    for stage, (width, count) in enumerate(stages):
        if stage:
            x = layers.MaxPooling2D(padding="same")(x)
        for place in "abc"[:count]:
            x = layers.ReLU()(convolution(x, width, f"{name}{stage}{place}"))
    return x


def slim_features(x):
    """The same with fewer weights where the maps are smallest: there are the most, and the most of the time."""
    return pooled_features(x, ((32, 2), (64, 2), (128, 3), (256, 2)), "slim")


def grown_features(x):
    """The residual network with one more block, at the full resolution, before the others."""
    return residual_features(x, ((32, 1), (64, 2), (128, 2), (128, 1), (256, 2), (256, 1)))


ARCHITECTURES = {
    "plain": plain_features, "vgg": vgg_features, "residual": residual_features, "grown": grown_features,
    "pooled": pooled_features, "slim": slim_features,
}  # fmt: skip


def with_fast_norms(layer):
    """Return a new layer like this one, with BatchNormalization of above in the place of Keras' own."""
    kind = BatchNormalization if isinstance(layer, layers.BatchNormalization) else type(layer)
    return kind.from_config(layer.get_config())


def build_model(architecture="residual", dropout=0.2, side=None, name="my_own_model", beside="", view=VIEW):
    """Build a CNN.

    Args:
        architecture: a name in ARCHITECTURES.
        dropout: share of the last features that is left out at random in training.
        side: of the faces that `look` gives; None for whole faces of 48x48, of whose middle the model sees `view`
            pixels, made of Keras' own layers only. The weights fit all of them.
        name: of the model.
        beside: the name of an architecture that is a second column, or none (Ciresan et al. 2012, arXiv:1202.2745).
        view: see `side`.

    Returns:
        keras.Model: (n, side, side, 1) float32 raw grey, 0 to 255, to (n, 7) softmax in the order of utils.EMOTIONS.
    """
    inputs = keras.Input((side or utils.SIDE, side or utils.SIDE, 1), name="face")
    x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    if side is None and view < utils.SIDE:
        x = layers.Cropping2D((utils.SIDE - view) // 2)(x)
    columns = [ARCHITECTURES[column](x) for column in (architecture, beside) if column]
    x = layers.Concatenate()(columns) if beside else columns[0]
    x = layers.GlobalAveragePooling2D(keepdims=True)(x)
    x = layers.Dropout(dropout)(x)
    x = layers.Conv2D(len(utils.EMOTIONS), 1, dtype="float32", name="emotion")(x)
    x = layers.GlobalAveragePooling2D(dtype="float32")(x)
    outputs = layers.Softmax(dtype="float32")(x)
    model = keras.Model(inputs, outputs, name=name)
    return keras.models.clone_model(model, clone_function=with_fast_norms) if side else model


def build_result(recipe, side=None, name="my_own_model"):
    """Build the network that a run with this recipe gives: if it says so, with a second column, or of lower rank."""
    beside = recipe_of(recipe["beside"])["architecture"] if recipe["beside"] else ""
    model = build_model(recipe["architecture"], recipe["dropout"], side, name, beside, recipe["view"])
    ranks = recipe["ranks"].split()
    return lower_rank(model, dict(zip(ranks[::2], map(int, ranks[1::2]), strict=True))) if ranks else model


def wide_convolutions(model):
    """Return the names of the 3x3 convolutions of `model` to 256 features or more, without their last "_" and on."""
    wide = [layer for layer in model.layers if isinstance(layer, layers.Conv2D) and layer.filters >= 256]
    return [layer.name.rpartition("_")[0] for layer in wide if layer.kernel_size == (3, 3)]


def lower_rank(model, ranks):
    """Build the network `model` with two convolutions in the place of each wide one and its batch norm.

    The first is 3x3 and gives as many features as `ranks` has for the name of the wide one; the second is 1x1, mixes
    them and has a bias (Zhang et al. 2016, arXiv:1505.06798, section 3.1). See `fit_low_rank` for the weights.
    """
    names = wide_convolutions(model)

    def call(layer, *inputs, **options):
        name, _, kind = layer.name.rpartition("_")
        if name not in names:
            return layer(*inputs, **options)
        if kind == "norm":
            return inputs[0]
        low = layers.Conv2D(ranks[name], 3, layer.strides, padding="same", use_bias=False, name=f"{name}_convolution")
        return layers.Conv2D(layer.filters, 1, name=f"{name}_mix")(low(*inputs))

    return keras.models.clone_model(model, call_function=call)


def fit_low_rank(model, whole, faces):
    """Give `model`, of `lower_rank`, weights with which it says nearly what the network `whole` says.

    What a wide convolution and its batch norm give for `faces`, (n, side, side, 1) float32, is projected on its
    principal components, as many as the first of the two convolutions has features. They are fitted one after the
    other, each with what those before it give now (Zhang et al. 2016, arXiv:1505.06798, sections 3.1 and 3.3).
    """
    wide = wide_convolutions(whole)
    for layer in model.layers:
        if layer.weights and layer.name.rpartition("_")[0] not in wide:
            layer.set_weights(whole.get_layer(layer.name).get_weights())
    for name in wide:
        low, mix = (model.get_layer(f"{name}_{kind}") for kind in ("convolution", "mix"))
        convolution, norm = (whole.get_layer(f"{name}_{kind}") for kind in ("convolution", "norm"))
        given = keras.Model(model.inputs, norm(convolution(low.input))).predict(faces, batch_size=256, verbose=0)
        given = given.reshape(-1, convolution.filters).astype(float)
        mean = given.mean(axis=0)
        components = np.linalg.eigh(np.cov(given.T))[1][:, ::-1][:, : low.filters]  # the largest variance first
        gamma, beta, moving_mean, variance = norm.get_weights()
        scale = gamma / np.sqrt(variance + norm.epsilon)
        shift = beta - scale * moving_mean
        low.set_weights([convolution.get_weights()[0] * scale @ components])
        mix.set_weights([components.T[None, None], mean + (shift - mean) @ components @ components.T])


def join_columns(model, columns):
    """Give `model`, of `build_model` with one architecture beside the other, the weights of two networks, in its order.

    Its logits are the mean of theirs.
    """
    for column in columns:
        for layer in column.layers:
            if layer.weights and layer.name != "emotion":
                model.get_layer(layer.name).set_weights(layer.get_weights())
    kernels, biases = zip(*(column.get_layer("emotion").get_weights() for column in columns), strict=True)
    weights = [np.concatenate(kernels, axis=2) / len(columns), np.mean(biases, axis=0)]
    model.get_layer("emotion").set_weights(weights)


def grow(model, start):
    """Give `model` the weights of `start`, layer by layer; what `start` does not have begins as the identity."""
    for layer in model.layers:
        if layer.weights and layer.name in {other.name for other in start.layers}:
            layer.set_weights(start.get_layer(layer.name).get_weights())
        elif layer.name.endswith("b_norm"):
            layer.gamma.assign(keras.ops.zeros_like(layer.gamma))


def recalibrate(model, faces, batch_size=256):
    """Set the statistics of all batch norms to those of `faces`, (n, side, side, 1) float32, 0 to 255.

    In training they are those of changed faces, whose contrast and scale vary more than those of faces as they are.
    """
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    momentum = [norm.momentum for norm in norms]
    for first in range(0, len(faces), batch_size):
        batch = faces[first : first + batch_size]
        for norm in norms:
            norm.momentum = first / (first + len(batch))  # which makes the moving average that of all faces so far
        model(batch, training=True)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value


def ends_of(run):
    """Return the files of weights that a run ends with: one for each of its cycles, or that of its best epoch."""
    return sorted(run.glob("cycle*.weights.h5")) or [run / "best.weights.h5"]


def kept_ends(run, arguments):
    """Return the files of weights whose mean a run gives; with `ends_before` those of the run before are among them."""
    return [*(ends_of(run.parent / folder_of(arguments["start"])) if arguments["ends_before"] else []), *ends_of(run)]


def load_weights(model, files, faces=None):
    """Give `model` the mean of the weights in `files` (Izmailov et al. 2018, arXiv:1803.05407).

    With `faces` its batch norms get their statistics, see `recalibrate`, without which a mean of weights is worth less.
    """
    loaded = []
    for file in files:
        model.load_weights(file)
        loaded.append(model.get_weights())
    model.set_weights([np.mean(weights, axis=0) for weights in zip(*loaded, strict=True)])
    if faces is not None:
        recalibrate(model, faces)


def trained_network(run, recipe, side, faces=None):
    """Return the network of a finished run, see `kept_ends`; with `faces` its batch norms get their statistics."""
    network = build_model(recipe["architecture"], recipe["dropout"], side, view=recipe["view"])
    load_weights(network, kept_ends(run, recipe), faces)
    return network


def network_of(iteration, runs, side, faces=None, view=VIEW):
    """Return the network of an iteration whose finished run is in the folder `runs`, see `trained_network`."""
    return trained_network(runs / folder_of(iteration), recipe_of(iteration) | {"view": view}, side, faces)


def cycle_of(arguments):
    """Return the epochs after which the learning rate is back at its peak: all of them, if no cycles fit into them."""
    epochs, cycles = int(arguments["epochs"]), int(arguments["cycles"])
    return epochs // cycles if epochs % cycles == 0 else epochs


def patience_of(arguments):
    """Return the epochs without a better loss after which training stops: with cycles, two of them at least."""
    cycle = cycle_of(arguments)
    return max(arguments["patience"], 2 * cycle) if cycle < arguments["epochs"] else arguments["patience"]


def ema_of(arguments, steps):
    """Return the momentum of the moving average: one over more than a twentieth of a cycle would lag behind it."""
    return min(arguments["ema"], max(0.0, 1 - 20 / (cycle_of(arguments) * steps)))


def compile_model(model, steps, epochs, cycle, learning_rate, weight_decay, label_smoothing, ema, optimizer="sgd"):
    """Compile `model` with the optimiser, the schedule over `epochs` of `steps`, the loss and the metric.

    After every `cycle` epochs the learning rate is back at its peak (Loshchilov and Hutter 2017, arXiv:1608.03983).
    """
    warm_up = min(2, epochs / 4) * steps
    schedules = keras.optimizers.schedules
    if cycle < epochs:
        schedule = schedules.CosineDecayRestarts(learning_rate, cycle * steps, t_mul=1.0)
    else:
        schedule = schedules.CosineDecay(
            0.0, epochs * steps - warm_up, warmup_target=learning_rate, warmup_steps=warm_up
        )
    options = {"weight_decay": weight_decay, "clipnorm": 5.0, "use_ema": ema > 0, "ema_momentum": ema}
    if optimizer == "adam":
        optimizer = keras.optimizers.AdamW(schedule, **options)
    else:
        optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, **options)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=label_smoothing)
    model.compile(optimizer, loss, metrics=["accuracy"])


def phases_of(arguments):
    """Return the phases of a run as (side of the faces, first epoch, epoch after the last), without empty ones."""
    last, share = arguments["epochs"], arguments["first_share"]
    switch = last if share == 1 else min(round(last * share), last - 1)
    return [
        (side, start, end)
        for side, start, end in ((arguments["first_side"], 0, switch), (VIEW, switch, last))
        if end > start
    ]


def read_rows(path):
    """Return the rows of a CSV file as dictionaries of str; none if it is not there."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []


def is_recorded(rows, arguments):
    """Return whether one of the rows, as `read_rows` gives them, is of a run with these arguments."""
    return any({name: str(value) for name, value in arguments.items()}.items() <= row.items() for row in rows)


def write_rows(path, rows):
    """Write dictionaries as a CSV file, with a column for every key that one of them has."""
    with utils.replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)


def read_log(path):
    """Return what CSVLogger wrote so far: a dictionary of lists of float, one entry an epoch; empty if nothing yet."""
    rows = read_rows(path)
    return {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}


class Epochs(keras.callbacks.Callback):
    """Seeds each epoch by its number, adds learning rate and seconds of training to the log, and tells the time left.

    A checkpoint holds no state of random generators: a resumed run would see another order, augmentation and dropout.
    """

    def __init__(self, batches, epochs_left):
        super().__init__()
        self.batches, self.epochs_left = batches, epochs_left

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()
        self.batches.start_epoch(epoch)
        for layer in self.model.layers:
            if isinstance(layer, layers.Dropout):
                layer.seed_generator.state.assign([self.batches.seed, epoch])

    def on_train_batch_begin(self, batch, logs=None):
        if batch == len(self.batches) - 1:  # read after it, it would be that of the next epoch, which may be a peak
            self.rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def on_test_begin(self, logs=None):
        self.trained = time.perf_counter()

    def on_epoch_end(self, epoch, logs):
        seconds = time.perf_counter() - self.start
        logs["learning_rate"] = self.rate
        logs["seconds"] = round(self.trained - self.start, 2)
        left = round(seconds * self.epochs_left(epoch) / 60)
        print(
            f"epoch {epoch + 1}: loss {logs['loss']:.3f}, on the validation faces {logs['val_loss']:.3f}, "
            f"accuracy {logs['val_accuracy']:.1%}; {seconds:.0f} s, about {left // 60} h {left % 60:02d} min left",
            flush=True,
        )


class EarlyStopping(keras.callbacks.EarlyStopping):
    """Keras' own, but a run that goes on counts its patience from the losses in the log, as if it had never stopped."""

    def __init__(self, past_losses, patience):
        super().__init__(patience=patience)
        self.past_losses = past_losses

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        for epoch, loss in enumerate(self.past_losses):
            self.on_epoch_end(epoch, {"val_loss": loss})


class EndsOfCycles(keras.callbacks.Callback):
    """Saves the weights at the end of every cycle of `length` epochs in the folder `run`."""

    def __init__(self, run, length):
        super().__init__()
        self.run, self.length = run, length

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.length == 0:
            whole = self.run / f"cycle{(epoch + 1) // self.length}.weights.h5"
            part = self.run / "part.weights.h5"  # Keras wants this ending
            self.model.save_weights(part)
            part.replace(whole)


def callbacks_for(run, batches, arguments, past_losses, is_last_phase, ema, epochs_left):
    """Return the callbacks of a phase, whose earlier epochs had `past_losses`, in the folder `run`.

    Their order matters. The log is written before the checkpoint, since a row too many can be taken back and one too
    few cannot; the checkpoint before the averaged weights are swapped in; and what is best is judged after that.
    """
    callbacks = [
        Epochs(batches, epochs_left),
        keras.callbacks.CSVLogger(run / "log.csv", append=True),
        keras.callbacks.BackupAndRestore(run / "backup", double_checkpoint=True, delete_checkpoint=False),
    ]
    if ema:
        callbacks.append(keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
    best = min(past_losses, default=None)
    callbacks.append(
        keras.callbacks.ModelCheckpoint(
            run / "best.weights.h5", save_best_only=True, save_weights_only=True, initial_value_threshold=best
        )
    )
    if cycle_of(arguments) < arguments["epochs"]:
        callbacks.append(EndsOfCycles(run, cycle_of(arguments)))
    if is_last_phase:
        callbacks.append(EarlyStopping(past_losses, patience_of(arguments)))
    if importlib.util.find_spec("tensorflow"):  # with which the TensorBoard callback writes, whatever the backend is
        callbacks.append(keras.callbacks.TensorBoard(run / "tensorboard", write_graph=False))
    return callbacks


def start_run(run, arguments):
    """Make the folder of a run, or check that the run which is there was started with the same arguments."""
    file = run / "arguments.json"
    try:
        started = json.loads(file.read_text())
    except FileNotFoundError:
        started = arguments
    except ValueError:
        raise utils.InputError(f"{file} is broken; delete {run} to train anew") from None
    changed = [name for name in arguments if started.get(name) != arguments[name]]
    if changed:
        raise utils.InputError(
            f"{run} holds a run with another {', '.join(changed)}: give --run another folder, or delete this one"
        )
    with utils.replacing(file) as path:
        path.write_text(json.dumps(arguments, indent=2) + "\n")


def finish_run(run, arguments, faces, held_out, before=None):
    """Train in the folder `run` unless its training is finished; see `train_model` and `start_run`."""
    start_run(run, arguments)
    if (run / "finished").is_file():
        print(f"{utils.show_path(run)} was trained to its end before; delete it to train again")
    else:
        train_model(run, arguments, faces, held_out, before)
        trained = len(read_log(run / "log.csv")["epoch"])
        if cycle_of(arguments) < arguments["epochs"] and len(ends_of(run)) != trained // cycle_of(arguments):
            raise utils.InputError(f"{run} was stopped while the end of a cycle was saved; delete it to train anew")
        (run / "finished").write_text(keras.backend.backend())


def start_from(run, arguments, faces, before):
    """Load the network that a run starts from, or else is put beside; its own run is finished, beside the folder `run`.

    Returns:
        The network, and targets for `faces`, (n, 7) float32: their labels, blended with the mean of what the
        teachers say of face and mirror image: of the network alone (Reed et al. 2015, arXiv:1412.6596, with a network
        that does not change meanwhile), or of those in `taught_by` (Hinton et al. 2015, arXiv:1503.02531), which are
        files in results/model, `start` for the network, and `beside` for the one whose column stands beside it.

    Raises:
        InputError: a teacher is not there.
    """
    folder = run.parent / folder_of(arguments["start"] or arguments["beside"])
    views = look(faces[0])
    norm_views = views if arguments["clean_norms"] else None
    start = trained_network(folder, before, VIEW, norm_views)
    targets = keras.utils.to_categorical(faces[1], len(utils.EMOTIONS))
    share, said = arguments["teacher"], run / "said.npy"
    if not share:
        return start, targets
    if not said.is_file():
        probabilities = []
        for teacher in arguments["taught_by"].split() or ["start"]:
            if teacher == "start":
                network, seen = start, views
            elif teacher == "beside" or teacher in CHANGES:
                iteration = arguments.get(teacher, teacher)
                network, seen = network_of(iteration, run.parent, VIEW, norm_views), views
            else:
                network, seen = utils.load_model(utils.MODEL.with_name(teacher)), faces[0][..., None].astype(np.float32)
            for view in (seen, seen[:, :, ::-1]):
                probabilities.append(network.predict(view, batch_size=256, verbose=0))
        with utils.replacing(said) as path:
            np.save(path, np.mean(probabilities, axis=0).astype(np.float32))
    return start, (1 - share) * targets + share * np.load(said)


def freeze(model, first):
    """Train no layer before the one called `first`; their batch norms then use their averages."""
    names = [layer.name for layer in model.layers]
    for layer in model.layers[: names.index(first)]:
        layer.trainable = False


def times_slower(precision):
    """Return how many times as long a step of a small network takes with this precision as with float32, here."""
    seconds = []
    for policy in ("float32", precision):
        keras.config.set_dtype_policy(policy)
        model = build_model("plain", side=VIEW)
        keras.config.set_dtype_policy("float32")
        compile_model(model, 1, 1, 1, 0.01, weight_decay=0.0, label_smoothing=0.0, ema=0.0)
        faces, targets = np.zeros((32, VIEW, VIEW, 1), np.float32), np.zeros((32, len(utils.EMOTIONS)), np.float32)
        for _ in range(3):  # the first one is slower
            start = time.perf_counter()
            model.train_on_batch(faces, targets)
            took = time.perf_counter() - start
        seconds.append(took)
    return seconds[1] / seconds[0]


def train_model(run, arguments, faces, held_out, before=None):
    """Train to the end in the folder `run`, going on where an earlier call was stopped.

    Args:
        run: Path of the folder, which gets log.csv, best.weights.h5, with cycles a file of weights for the end of each,
            the checkpoint, and TensorBoard's files.
        arguments: the recipe and the other arguments, as they are in arguments.json.
        faces: pair of (n, 48, 48) uint8 images and (n,) labels to train on.
        held_out: the same, to validate on.
        before: the arguments of the finished run that this one starts from, or else is put beside; None if its recipe
            names none.
    """
    log, backup = run / "log.csv", run / "backup" / "training_metadata.json"
    done = json.loads(backup.read_text())["epoch"] if backup.is_file() else 0
    if log.is_file():  # an epoch after the checkpoint is trained again
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(lines[: done + 1]))
    start_model, targets = start_from(run, arguments, faces, before) if before else (None, faces[1])
    precision = arguments["precision"]
    slower = times_slower(precision) if precision != "float32" else 1.0
    if slower > 2:
        print(
            f"{precision} takes {slower:.0f} times as long as float32 here: --precision float32 is faster", flush=True
        )
    phases = phases_of(arguments)
    sides = [side for side, start, end in phases for _ in range(start, end)]

    def epochs_left(epoch):
        return sum((side / sides[epoch]) ** 2 for side in sides[epoch + 1 :])

    for side, start, end in phases:
        past_losses = read_log(log).get("val_loss", [])
        past = past_losses[start:]
        is_last = end == arguments["epochs"]
        if len(past_losses) >= end or (is_last and past and len(past) - 1 - np.argmin(past) >= patience_of(arguments)):
            continue
        seed = arguments["seed"] + arguments["seed_offset"]  # the split of the faces is by the seed alone
        keras.utils.set_random_seed(seed)
        options = {name: arguments[name] for name in BATCH_OPTIONS} | {"seed": seed}
        cycle = cycle_of(arguments)
        calm = round(cycle * arguments["strong_share"])
        batches = FaceBatches(faces[0], targets, side, calm=calm, period=cycle, **options)
        keras.config.set_dtype_policy(precision)
        model = build_model(arguments["architecture"], arguments["dropout"], side)
        keras.config.set_dtype_policy("float32")
        if arguments["start"]:
            grow(model, start_model)
        if arguments["frozen"]:
            freeze(model, arguments["frozen"])
        names = ("epochs", "learning_rate", "weight_decay", "label_smoothing", "optimizer")
        options = {name: arguments[name] for name in names}
        ema = ema_of(arguments, len(batches))
        compile_model(model, len(batches), cycle=cycle, ema=ema, **options)
        model.fit(
            batches,
            validation_data=(look(held_out[0], side), keras.utils.to_categorical(held_out[1], len(utils.EMOTIONS))),
            validation_batch_size=256,
            epochs=end,
            shuffle=False,  # FaceBatches shuffles, by epoch, so that a resumed run sees the same order
            callbacks=callbacks_for(run, batches, arguments, past, is_last, ema, epochs_left),
            verbose=1 if sys.stdout.isatty() else 0,
        )


def fit_temperature(probabilities, labels):
    """Return the temperature, from 0.25 to 4, with the lowest cross-entropy.

    Args:
        probabilities: (n, 7) float, each row a softmax.
        labels: (n,) int.
    """
    logits = np.log(np.maximum(probabilities.astype(np.float64), 1e-12))
    temperatures = np.geomspace(0.25, 4, 801)
    rows = np.arange(len(labels))

    def cross_entropy(temperature):
        scaled = logits / temperature
        return (np.log(np.exp(scaled).sum(axis=1)) - scaled[rows, labels]).mean()

    return float(min(temperatures, key=cross_entropy))


def divide_logits(model, temperature):
    """Divide the logits of a model of `build_model` by `temperature`, in its weights."""
    layer = model.get_layer("emotion")
    layer.set_weights([weights / temperature for weights in layer.get_weights()])


def measure_augmentation(arguments, faces, side):
    """Return the milliseconds that one batch of training faces takes to make."""
    options = {name: arguments[name] for name in BATCH_OPTIONS}
    batches = FaceBatches(*faces, side, **options)
    start = time.perf_counter()
    count = min(20, len(batches))
    for index in range(count):
        batches[index]
    return (time.perf_counter() - start) / count * 1000


def scores(probabilities, labels, temperature=1.0):
    """Return accuracy and mean cross-entropy in nats of (n, 7) probabilities, after division by a temperature."""
    scaled = np.maximum(probabilities.astype(np.float64), 1e-12) ** (1 / temperature)
    right = scaled[np.arange(len(labels)), labels] / scaled.sum(axis=1)
    return round(float((scaled.argmax(axis=1) == labels).mean()), 4), round(float(-np.log(right).mean()), 4)


def measure_run(run, arguments, faces, held_out, past=(), name="my_own_model"):
    """Build the network that a finished run ends with, calibrate it and measure it.

    Args:
        run: Path of the run's folder.
        arguments: its recipe and other arguments.
        faces: pair of (n, 48, 48) uint8 images and (n,) labels that it was trained on.
        held_out: the same, to validate on.
        past: logs of the runs whose weights led to its own.
        name: of the network.

    Returns:
        The network, with its temperature in its weights; a dictionary of figures, where the run before had other
        validation faces also those of the network before on these; and one of what else could have been
        kept, each with its figures: the end of each cycle, all of them as a committee, other batch norms, each column,
        the middle of the faces, kernels of full rank.
    """
    log = read_log(run / "log.csv")
    side, start, _ = phases_of(arguments)[-1]
    best = start + int(np.argmin(log["val_loss"][start:]))
    # The saved model gets whole faces; an iteration that saw small ones to the end is measured on such.
    saved_side = None if side == VIEW else side
    result = build_result(arguments, saved_side, name)
    whole = build_result(arguments | {"ranks": ""}, saved_side, name) if arguments["ranks"] else result
    is_whole = not arguments["beside"] and arguments["view"] == VIEW
    column = whole if is_whole else build_model(arguments["architecture"], arguments["dropout"], saved_side)

    def view(images):
        return images[..., None].astype(np.float32) if side == VIEW else look(images, side)

    def said_by(columns):
        likely = [network.predict(plain, batch_size=256, verbose=0) for network in columns]
        likely = np.prod(likely, axis=0) ** (1 / len(columns))  # their logits' mean
        return likely / likely.sum(axis=1, keepdims=True)

    plain, step = view(held_out[0]), max(1, len(faces[0]) // 3000)
    norm_faces = view(faces[0][:: max(1, len(faces[0]) // 5000)]) if arguments["clean_norms"] else None
    ends, said, made_of = ends_of(run), {}, {}
    for end in ends if len(ends) > 1 else []:
        load_weights(column, [end], norm_faces)
        said[end.name.split(".")[0]] = column.predict(plain, batch_size=256, verbose=0)
    if said:
        said["committee of these"] = np.mean(list(said.values()), axis=0)
    kept = kept_ends(run, arguments)
    if kept != ends:
        load_weights(column, ends, norm_faces)
        said["mean without the run before"] = column.predict(plain, batch_size=256, verbose=0)
    if arguments["clean_norms"]:
        load_weights(column, kept)
        said["batch norms of the training"] = column.predict(plain, batch_size=256, verbose=0)
    load_weights(column, kept, norm_faces)
    columns = [column]
    if arguments["beside"]:
        columns.append(network_of(arguments["beside"], run.parent, saved_side, norm_faces))
        for what, network in zip(("this run's column", f"that of {arguments['beside']}"), columns, strict=True):
            said[f"{what} alone"] = network.predict(plain, batch_size=256, verbose=0)
    if arguments["view"] != VIEW:
        said["with the view of the training"] = said_by(columns)
        columns = [trained_network(run, arguments, saved_side, norm_faces)]
        if arguments["beside"]:
            columns.append(network_of(arguments["beside"], run.parent, saved_side, norm_faces, arguments["view"]))
    if not is_whole:
        join_columns(whole, columns)
    if whole is not result:
        said["with kernels of full rank"] = whole.predict(plain, batch_size=256, verbose=0)
        fit_low_rank(result, whole, view(faces[0][:: max(1, len(faces[0]) // 1300)]))
    for what, probabilities in said.items():
        pair = scores(probabilities, held_out[1], fit_temperature(probabilities, held_out[1]))
        made_of[what] = {"validation_accuracy": pair[0], "validation_cross_entropy": pair[1]}
    probabilities = result.predict(plain, batch_size=256, verbose=0)
    temperature = fit_temperature(probabilities, held_out[1])
    divide_logits(result, temperature)
    calibrated = result.predict(plain, batch_size=256, verbose=0)
    on_training = result.predict(view(faces[0][::step]), batch_size=256, verbose=0)
    steps = max(1, len(faces[0]) // arguments["batch_size"])
    accuracy, cross_entropy = scores(calibrated, held_out[1])
    figures_before = {}
    origin = run.parent / folder_of(arguments["start"]) / "arguments.json"
    origin = json.loads(origin.read_text()) if arguments["start"] in CHANGES else arguments
    if origin["validation_fraction"] != arguments["validation_fraction"]:
        names = [arguments[name] for name in ("start", "beside") if arguments[name]]
        columns = [network_of(name, run.parent, saved_side, norm_faces, arguments["view"]) for name in names]
        likely = said_by(columns)
        pair = scores(likely, held_out[1], fit_temperature(likely, held_out[1]))
        figures_before = {"accuracy_before": pair[0], "cross_entropy_before": pair[1]}
    return (
        result,
        {
            "parameters": result.count_params(),
            "backend": (run / "finished").read_text(),
            "train_images": len(faces[0]),
            "validation_images": len(held_out[0]),
            "epochs_trained": len(log["epoch"]),
            "best_epoch": best + 1,
            "validation_accuracy": accuracy,
            "validation_cross_entropy": cross_entropy,
            **figures_before,
            "training_accuracy": scores(on_training, faces[1][::step])[0],
            "temperature": round(temperature, 4),
            "validation_calibration_error": round(utils.calibration_error(calibrated, held_out[1]), 4),
            "validation_calibration_error_before": round(utils.calibration_error(probabilities, held_out[1]), 4),
            "minutes": round(sum(log["seconds"]) / 60, 1),
            "minutes_before": round(sum(sum(earlier.get("seconds", [])) for earlier in past) / 60, 1),
            "ema_used": round(ema_of(arguments, steps), 5),
            "milliseconds_a_step": round(1000 * float(np.median(log["seconds"][start:])) / steps, 1),
            "milliseconds_of_augmentation_a_step": round(measure_augmentation(arguments, faces, side), 1),
        },
        made_of,
    )


def weights_from(iteration):
    """Return the names of the iterations whose weights are in the network of this one, its own first."""
    names = []
    for column in filter(None, (iteration, recipe_of(iteration)["beside"])):
        recipe = recipe_of(column)
        names += [column, recipe["start"]] if recipe["ends_before"] else [column]
    return names


def kept_epochs(row):
    """Return the numbers of the epochs, from 1, whose weights an iteration kept: its row is one of iterations.csv."""
    cycle, last = cycle_of(row), int(row["epochs_trained"])
    return list(range(cycle, last + 1, cycle)) if cycle < int(row["epochs"]) else [int(row["best_epoch"])]


def plot_learning_curves(names, logs, row):
    """Return a figure of loss and accuracy over the epochs of runs, each of which needed the one before it.

    Args:
        names: of the runs' iterations, in the order of their training.
        logs: their logs, as `read_log` gives them; an earlier one may be empty.
        row: of iterations.csv, for the last run.
    """
    import matplotlib.pyplot as plt  # here, because a machine that only trains needs none

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    saved = {"loss": float(row["validation_cross_entropy"]), "accuracy": float(row["validation_accuracy"])}
    kept = kept_epochs(row)
    for axis, name, unit in zip(axes, ("loss", "accuracy"), ("cross-entropy, nats", "share of images"), strict=True):
        before, small, ends = 0, "small faces", []
        for number, (iteration, log) in enumerate(zip(names, logs, strict=True)):
            if not log:
                continue
            recipe, count = recipe_of(iteration), len(log["epoch"])
            if iteration == names[-1]:
                recipe["epochs"] = int(row["epochs"])
            switch = next((start for side, start, _ in phases_of(recipe) if side == VIEW), count)
            epochs = before + 1 + np.arange(count)
            labels = ("_", "_") if before else ("training faces, as they were changed", "validation faces")
            axis.plot(epochs, log[name], "--", color="0.5", label=labels[0])
            axis.plot(epochs, log[f"val_{name}"], "-", color="black", label=labels[1])
            if switch:
                axis.axvspan(before + 0.5, before + switch + 0.5, color="0.93", label=small)
                small = "_"
            place = {"transform": axis.get_xaxis_transform(), "ha": "center", "va": "top"}
            place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
            words = "\n(smoothed labels)" if name == "loss" and recipe["label_smoothing"] else ""
            other = iteration != names[0] and recipe["architecture"] != recipe_of(names[number - 1])["architecture"]
            words += "\n(the other column)" if recipe["beside"] and other else ""
            axis.text(before + count / 2, 0.98, iteration + words, **place)
            if before:
                axis.axvline(before + 0.5, color="0.4", linewidth=0.8)
            if iteration == names[-1]:
                ends += [before + epoch for epoch in kept]
            elif iteration in weights_from(names[-1]):
                large = switch if switch < count else 0
                best = large + 1 + int(np.argmin(log["val_loss"][large:]))
                ends += [before + end for end in kept_epochs(recipe | {"epochs_trained": count, "best_epoch": best})]
            before += count
        for mark, epoch in enumerate(ends):
            text = f"epoch{'s' * (len(ends) > 1)} whose weights are kept" + ", as a mean" * (len(ends) > 1)
            axis.axvline(epoch, linestyle=":", color="black", label="_" if mark else text)
        axis.axvline(before, linestyle="-.", color="0.7", label=f"training stopped: epoch {before}", zorder=0)
        axis.plot(
            before, saved[name], "k*", markersize=11, label="validation faces, the saved model, with its temperature"
        )
        axis.set_xlabel("epoch")
        axis.set_ylabel(f"{name} ({unit})")
        axis.grid(alpha=0.3)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    shown = [name for name, log in zip(names, logs, strict=True) if log]
    figure.suptitle(f"Learning curves: {', then '.join(shown)}")
    return figure


WHY = """\
- It was trained on 44x44 of a face's 48x48 pixels, moved, turned and scaled, and sees all 48x48 when that is over, with
  batch norms of such faces (Touvron et al. 2019, arXiv:1906.06423). Maps of 48, 24 and 12 pixels are what OpenCV
  convolves fast (Lavin and Gray 2016, arXiv:1509.09308); those of 11 it does not.
- It has two columns, which see the same pixels and share nothing but the head. One has residual blocks, whose strides
  halve the resolution; the other has max pooling and no shortcuts. Networks of two kinds err on different faces, and
  the mean of their logits has a lower cross-entropy than either.
- Both keep the full resolution at first: an eyebrow is three pixels high, and an early stride would lose it.
- Where the resolution halves the width doubles, so that every stage costs about the same, and most of the parameters
  are where the maps are small and cheap.
- The 3x3 kernels to 256 features and more are split into two, 3x3 ones to half as many features or less, and 1x1 ones
  that mix these: what they give for faces is nearly of such a rank, the later ones of the lowest. They were trained
  whole, and split when training had ended.
- Batch norm after every convolution allows the high learning rate that stochastic gradient descent generalises with.
- The head averages over the map and has one weight per feature and emotion. There is little in it that could overfit,
  and dropout is all it needs. It is a 1x1 convolution, which OpenCV reads as Keras wrote it.
- No layer is there that OpenCV's dnn cannot run exactly: the live stream starts without TensorFlow.
- The logits are divided by a temperature that was found on the validation faces, so that 73 % should mean right in
  73 of 100 cases."""
TAUGHT = {
    "plain": "It is far better than weighing pixels (02_eda), and does not know even its training faces well.",
    "vgg": "Nothing but time was worth as much later. From the middle on the validation loss rose again.",
    "augmented": "The loss of the same network no longer rose: the last epoch was its best.",
    "residual": "No gain in so few epochs, rather a loss: it learns more slowly. It was kept for the long runs; "
    "only the last of all shows how far the other kind goes in one.",
    "regularised": "No gain either: what softens the targets and hides the faces slows the learning down still more.",
    "long": "Time was what the two before it lacked. The last fifth, without mixup and erasing, brought a part of it.",
    "grown": "The accuracy on the validation faces stayed where it was, and the cross-entropy fell.",
    "cycles": "The mean of the two ends is better than either, and nearly as good as both as a committee. The batch "
    "norms of plain faces help too, and cost nothing.",
    "taught": "Hardly a gain: other targets and more cycles changed the accuracy by less than chance does. The mean "
    "over both runs had the lowest cross-entropy so far, by little; the batch norms of plain faces no "
    "longer matter.",
    "final": "The new column alone is right more often than the old one, which was one of its teachers, after fewer "
    "epochs and at a lower price: the shortcuts were not needed. Together they have by far the lowest cross-entropy, "
    "but on the validation faces no higher accuracy than the new one alone. The split of the kernels saved nearly half "
    "of the weights, the view of whole faces a tenth of the time; together they changed accuracy and cross-entropy by "
    "less than chance does.",
    "onward": "A step back in cross-entropy, and on the training faces: in eleven epochs a cycle does not bring back "
    "what its learning rate undoes, and the mean of both ends is no better than the first. So the network of final "
    "is kept. Longer cycles and lower rates were not tried.",
    "refit_residual": "No gain: the cross-entropy on the faces that are left rose a little. The loss was lowest before "
    "the calm end, which made the column surer and right more often.",
    "refit_pooled": "A gain of the size of chance, on the few faces that are left. 03 says why final stays.",
    "slim": "Alone it is behind the column whose place it was to take, and beside the other one too. It was to be kept "
    "only if the cross-entropy of the pair was lower, so it is not. What it would have saved was saved by the split of "
    "the kernels of final, at a lower cost.",
}


def describe_row(row, before=None):
    """Return the lines of an architecture text for a row of iterations.csv; `before` is the accuracy before it."""
    accuracy, training = float(row["validation_accuracy"]), float(row["training_accuracy"])
    cross_entropy = float(row["validation_cross_entropy"])
    error = 1.96 * np.sqrt(accuracy * (1 - accuracy) / int(row["validation_images"]))
    change = "" if before is None else f", {(accuracy - before) * 100:+.1f} points"
    kept = kept_epochs(row)
    kept = f"epoch {kept[0]}" if len(kept) == 1 else f"the mean of the epochs {', '.join(map(str, kept))}"
    others = f", with the ends of {row['start']} in the mean" if str(row["ends_before"]) == "True" else ""
    others += f", beside the network of {row['beside']}" if row["beside"] else ""
    earlier = row.get("cross_entropy_before")
    earlier = (
        [f"    The network before had {float(row['accuracy_before']):.1%} and {float(earlier):.3f} there."]
        if earlier
        else []
    )
    return [
        f"    {int(row['parameters']):,} parameters, {kept} of {row['epochs_trained']} kept{others}.",
        f"    Accuracy on {int(row['validation_images']):,} validation faces {accuracy:.1%} (+-{error:.1%}{change}), "
        f"on training {training:.1%};",
        f"    cross-entropy on validation faces {cross_entropy:.3f}; {row['minutes']} minutes.",
        *earlier,
    ]


def architecture_text(model, rows):
    """Return the text of my_own_model_architecture.txt: the layers, why they are what they are, and the iterations."""
    lines = []
    model.summary(line_length=80, print_fn=lines.append)
    lines += ["", "WHY THIS ARCHITECTURE", "", WHY, "", "THE ITERATIONS", ""]
    before, faces, measured = None, "", {row["iteration"]: row for row in rows}
    for name, (_, reason) in CHANGES.items():
        lines.append(f"{name}: {reason}")
        if name in measured:
            if measured[name]["validation_images"] != faces:  # accuracies on other faces are not compared
                before, faces = None, measured[name]["validation_images"]
            lines += describe_row(measured[name], before)
            lines += [f"    Taught: {TAUGHT[name]}"] if name in TAUGHT else []
            before = float(measured[name]["validation_accuracy"])
        else:
            lines.append("    Not measured yet.")
        lines.append("")
    return "\n".join(lines)


def parse_args(argv=None):
    """Parse the command line, `sys.argv[1:]` unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--iteration",
        type=str,
        default="final",
        help="of the recipe, from plain and vgg to final and slim; another lists all (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=0,
        help="passes over the training images; 0 for the recipe's own number (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=0.0, help="its peak; 0 for the recipe's own (default: %(default)s)"
    )
    parser.add_argument(
        "--weight-decay",
        type=float,
        default=0.005,
        help="decoupled, as Keras applies it; about 0.0005 as an L2 term under momentum 0.9 (default: %(default)s)",
    )
    parser.add_argument(
        "--patience",
        type=int,
        default=20,
        help="epochs without a better validation loss after which training stops (default: %(default)s)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.0,
        help="share of the training images that is held out; 0 for the recipe's own (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        type=str,
        default="",
        help="of the arithmetic while training, float32 or mixed_bfloat16; empty for the recipe's own",
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="use this many training images only; 0 for all (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the split, the weights and the augmentation (default: %(default)s)"
    )
    parser.add_argument(
        "--again",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train although the results hold this very run (default: %(default)s)",
    )
    parser.add_argument("--data", type=str, default="", help="folder with FER2013; empty for data")
    parser.add_argument(
        "--run",
        type=str,
        default="",
        help="folder for checkpoints and logs; empty for one in runs/ named after the iteration",
    )
    parser.add_argument(
        "--output",
        type=str,
        default="",
        help="folder for the results; empty for results/model, whose files are replaced",
    )
    return parser.parse_args(argv)


def main(
    iteration: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    patience: int,
    validation_fraction: float,
    precision: str,
    limit: int,
    seed: int,
    again: bool,
    data: str,
    run: str,
    output: str,
):
    check_arguments(epochs, batch_size, patience, validation_fraction or BASE["validation_fraction"], limit, seed)
    if not 0 <= learning_rate < 10 or not 0 <= weight_decay < 1:
        raise utils.InputError("expected a learning_rate from 0 to 10, and a weight_decay from 0 to 1")
    if precision not in ("", "float32", "mixed_bfloat16", "mixed_float16"):
        raise utils.InputError(f"precision is {precision!r}; expected float32, mixed_bfloat16 or mixed_float16")
    given = {
        "batch_size": batch_size,
        "weight_decay": weight_decay,
        "patience": patience,
        "limit": limit,
        "seed": seed,
    }
    own = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "precision": precision,
        "validation_fraction": validation_fraction,
    }
    given |= {name: value for name, value in own.items() if value}
    arguments = recipe_of(iteration) | given

    keras.utils.set_random_seed(seed)
    parts = load_parts(data, limit, arguments["validation_fraction"], seed)

    folder = Path(output) if output else utils.MODEL.parent
    table = folder / "iterations.csv"
    rows = read_rows(table)
    recorded = not again and is_recorded(rows, {"iteration": iteration} | arguments)
    run_folder = Path(run) if run else utils.RUNS / folder_of(iteration)
    if recorded:
        print(f"{utils.show_path(folder)} holds this run of {iteration}; --again trains it anew")
    else:
        if again and (run_folder / "finished").is_file():
            shutil.rmtree(run_folder)
        for name in history_of(iteration):  # its own is the last
            recipe = recipe_of(name) | given
            before = recipe["start"] or recipe["beside"]
            same_faces = recipe["validation_fraction"] == arguments["validation_fraction"]
            their_parts = parts if same_faces else load_parts(data, limit, recipe["validation_fraction"], seed)
            place = run_folder if name == iteration else run_folder.parent / folder_of(name)
            finish_run(place, recipe, *their_parts, recipe_of(before) | given if before else None)
        if keras.backend.backend() != "tensorflow":
            # The file for OpenCV is written by TensorFlow. Weights and log are in the run's folder, which can be moved.
            print(f"{utils.show_path(run_folder)} is trained; the same command with KERAS_BACKEND=tensorflow saves it")

    if not recorded and keras.backend.backend() == "tensorflow":
        keras.utils.clear_session()  # so that the layers are numbered from one again
        past = [read_log(run_folder.parent / folder_of(name) / "log.csv") for name in history_of(iteration)[:-1]]
        final, figures, made_of = measure_run(run_folder, arguments, *parts, past)
        print(json.dumps(figures, indent=2))
        # Read again: while this one was training, another may have written its row.
        row = {"iteration": iteration, **figures, **arguments}
        rows = [other for other in read_rows(table) if other["iteration"] != iteration] + [row]
        rows.sort(key=lambda row: list(CHANGES).index(row["iteration"]))
        with utils.replacing(folder / "logs" / f"{iteration}.csv") as path:
            path.write_text((run_folder / "log.csv").read_text())
        if iteration == "final":
            figure = plot_learning_curves(history_of(iteration), [*past, read_log(run_folder / "log.csv")], row)
            report = {**figures, "made_of": made_of, "keras": keras.__version__, "arguments": arguments}
            utils.save_model(final, folder / "my_own_model.pkl")
            utils.save_fig(figure, folder / "learning_curves.png")
            with utils.replacing(folder / "my_own_model.json") as path:
                path.write_text(json.dumps(report, indent=2) + "\n")
        write_rows(table, rows)
    if any(row["iteration"] == "final" for row in rows):
        keras.utils.clear_session()
        text = architecture_text(build_result(recipe_of("final")), rows)
        with utils.replacing(folder / "my_own_model_architecture.txt") as path:
            path.write_text(text, encoding="utf-8")
    if rows and (recorded or keras.backend.backend() == "tensorflow"):
        print(f"the results are in {utils.show_path(folder)}")


if __name__ == "__main__":
    utils.run_script(main, parse_args)
