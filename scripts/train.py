# Generated from notebooks/03_cnn_iterations.ipynb by `make scripts`: edit the notebook, not this file.
"""Trains a CNN from scratch on the training rows of FER2013, in one run, and saves it for the other scripts."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def tell_in_one_line(kind, error, trace):
    """Tell what ends the imports as utils.run_script tells what ends the rest: Ctrl-C, or a Keras that cannot start."""
    if kind.__name__ not in ("KeyboardInterrupt", "InputError"):
        sys.__excepthook__(kind, error, trace)
    else:
        print("interrupted" if kind is KeyboardInterrupt else f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.excepthook = tell_in_one_line

import json
import shutil
from dataclasses import asdict, replace

import training
import utils
from training import keras, layers


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


def pooled_features(x, stages=((32, 2), (64, 2), (128, 3), (320, 3))):
    """Stages of 3x3 convolutions with max pooling between them (Simonyan and Zisserman 2015, arXiv:1409.1556).

    Each stage has a width and a number of convolutions.
    """
    for stage, (width, count) in enumerate(stages):
        if stage:
            x = layers.MaxPooling2D()(x)
        for place in "abc"[:count]:
            x = layers.ReLU()(convolution(x, width, f"stage{stage}{place}"))
    return x


def vgg_features(x):
    """The same, with two convolutions in each stage."""
    return pooled_features(x, ((32, 2), (64, 2), (128, 2), (256, 2)))


def deep_features(x):
    """Five stages. The last one sees maps of 3x3 pixels and takes little time."""
    return pooled_features(x, ((32, 2), (64, 2), (128, 3), (256, 3), (352, 2)))


def residual_features(x, blocks=((64, 2), (128, 2), (128, 1), (256, 2), (256, 1))):
    """A stem that keeps the resolution, then residual blocks (He et al. 2016, arXiv:1512.03385).

    Each block has a width and a stride.
    """
    x = layers.ReLU()(convolution(x, 32, "stem"))
    for place, (width, stride) in enumerate(blocks):
        shortcut = x
        x = layers.ReLU()(convolution(x, width, f"block{place}a", stride=stride))
        x = convolution(x, width, f"block{place}b")
        if shortcut.shape[1:] != x.shape[1:]:
            shortcut = convolution(shortcut, width, f"block{place}_shortcut", size=1, stride=stride)
        x = layers.ReLU()(layers.Add()([x, shortcut]))
    return x


ARCHITECTURES = {
    "plain": plain_features, "vgg": vgg_features, "residual": residual_features, "pooled": pooled_features,
    "deep": deep_features,
}  # fmt: skip


def build_model(architecture, side=utils.SIDE):
    """Build a CNN of Keras' own layers.

    Args:
        architecture: a name in ARCHITECTURES.
        side: of the faces, in pixels; None for any side, as in training. The weights fit all of them.

    Returns:
        keras.Model: (n, side, side, 1) float32 raw grey, 0 to 255, to (n, 7) softmax in the order of utils.EMOTIONS.
    """
    inputs = keras.Input((side, side, 1), name="face")
    x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = ARCHITECTURES[architecture](x)
    x = layers.GlobalAveragePooling2D(keepdims=True)(x)
    x = layers.Dropout(0.2)(x)
    x = layers.Conv2D(len(utils.EMOTIONS), 1, dtype="float32", name="emotion")(x)
    x = layers.GlobalAveragePooling2D(dtype="float32")(x)
    return keras.Model(inputs, layers.Softmax(dtype="float32")(x), name="my_own_model")


PLAIN = training.Recipe()
VGG = replace(PLAIN, architecture="vgg")
AUGMENTED = replace(VGG, augmented=True)
REGULARISED = replace(AUGMENTED, mixup=0.2, erasing=0.5, average=0.999)
POOLED = replace(REGULARISED, architecture="pooled", camera=0.3, epochs=200)
ADAPTED = replace(POOLED, adapted=0.1)
ITERATIONS = {
    "plain": replace(PLAIN, epochs=8),
    "vgg": VGG,
    "augmented": AUGMENTED,
    "residual": replace(AUGMENTED, architecture="residual"),
    "regularised": REGULARISED,
    "smoothed": replace(AUGMENTED, smoothing=0.1),
    "pooled": POOLED,
    "adapted": ADAPTED,
    "deep": replace(ADAPTED, architecture="deep", small_share=0.3, camera=0.2),
}
SHIPPED = "deep"
QUESTIONS = {
    "plain": "How far do three convolutions go? This is the yardstick, in fewer epochs.",
    "vgg": "What do depth and batch norm bring?",
    "augmented": "Does it help to change every training face a little, each time anew?",
    "residual": "Are shortcuts and strides better than max pooling?",
    "regularised": "Do mixup, erasing and a moving average of the weights help?",
    "smoothed": "Many labels are doubtful. Does it help to smooth them?",
    "pooled": "How far does a wider network go with all of this, and with time?",
    "adapted": "Does it help to correct doubtful labels while the network learns?",
    "deep": "Do a fifth stage, whole faces from earlier on, and fewer poor cameras help?",
}


def recipe_of(iteration, epochs=0):
    """Return the Recipe of an iteration, with its own number of epochs if `epochs` is 0.

    Raises:
        InputError: there is no such iteration.
    """
    if iteration not in ITERATIONS:
        raise utils.InputError(f"iteration is {iteration!r}; expected one of {', '.join(ITERATIONS)}")
    return replace(ITERATIONS[iteration], epochs=epochs or ITERATIONS[iteration].epochs)


def plot_run(log, figures, recipe):
    """Return a matplotlib figure of loss and accuracy over the epochs of a run.

    Args:
        log: as training.read_log gives it.
        figures: as training.finish gives them.
        recipe: a Recipe.
    """
    spans = {"faces of 32x32 pixels": (0, recipe.small_epochs)}
    if recipe.mixup:
        spans["no more mixup and erasing"] = (round(0.8 * recipe.epochs), recipe.epochs)
    figure = training.plot_learning_curves(log, figures["best_epoch"], spans)
    figure.suptitle(
        "The validation loss is lowest in the last epoch"
        if figures["best_epoch"] == len(log["epoch"])
        else "The weights of the lowest validation loss are kept"
    )
    return figure


WHY = """\
- Every stage has two or three 3x3 convolutions. Two of them see as much as one of 5x5, with 18 weights in place of 25,
  and a nonlinearity more (Simonyan and Zisserman 2015, arXiv:1409.1556).
- The first stage keeps the full resolution: an eyebrow is three pixels high, and an early stride would lose it.
- The width grows where the resolution halves. So most of the parameters are where the maps are small.
- Max pooling halves the resolution. Twelve convolutions with batch norm learn without shortcuts.
- Batch norm after every convolution allows the high learning rate with which stochastic gradient descent generalises.
- The head averages over the map and has one weight per feature and emotion, with dropout before it: little in it could
  overfit. It is a 1x1 convolution, which OpenCV reads as Keras wrote it.
- Two people often disagree about a face of FER2013. Late in the run the labels move a part of the way towards what the
  averaged weights say (Huang et al. 2020, arXiv:2002.10319), so that fewer wrong ones are learnt by heart.
- No layer is there that OpenCV's dnn cannot run exactly: the live stream starts without TensorFlow.
- The logits are divided by a temperature that was found on the validation faces, so that a probability comes nearer to
  the share of faces that are right."""


def save_results(folder, run, model, row, log):
    """Save what a run gave in the folder of the results: its row and log and, if it is SHIPPED, the model."""
    shipped = row["iteration"] == SHIPPED
    if shipped:
        utils.save_model(model, folder / utils.MODEL.name)
        with utils.replacing(folder / "my_own_model.json") as path:
            path.write_text(json.dumps(row, indent=2) + "\n")
        recipe = recipe_of(SHIPPED, row["epochs"])
        training.save_plot(folder / "learning_curves.png", plot_run, log, row, recipe)
    with utils.replacing(folder / "logs" / f"{row['iteration']}.csv") as path:
        shutil.copy(run / "log.csv", path)
    table = folder / "iterations.csv"
    rows = {other["iteration"]: other for other in [*training.read_rows(table), row]}
    training.write_rows(table, [rows[name] for name in ITERATIONS if name in rows])
    if any(other["iteration"] == SHIPPED for other in training.read_rows(table)):
        model = model if shipped else utils.load_model(folder / utils.MODEL.name)
        told = (
            "THE ITERATIONS",
            "Each began from random weights. In brackets: what differs from a plain one of 20 epochs.",
        )
        text = training.architecture_text(WHY, *told, training.read_rows(table), PLAIN, QUESTIONS, model)
        with utils.replacing(folder / "my_own_model_architecture.txt") as path:
            path.write_text(text, encoding="utf-8")


def parse_args(argv=None):
    """Parse the command line, `sys.argv[1:]` unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--iteration",
        type=str,
        default="deep",
        help="name of the recipe to train; an unknown name lists all (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=0,
        help="passes over the training images; 0 for the recipe's own number (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (default: %(default)s)")
    parser.add_argument(
        "--patience",
        type=int,
        default=20,
        help="epochs without a better validation loss after which training stops (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        type=str,
        default="",
        help="arithmetic in training, float32 or mixed_bfloat16; empty for the faster one here",
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="use this many training images only; 0 for all (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of the split, the weights and the augmentation (default: %(default)s)",
    )
    parser.add_argument(
        "--again",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train even if the results hold this run already (default: %(default)s)",
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
    patience: int,
    precision: str,
    limit: int,
    seed: int,
    again: bool,
    data: str,
    run: str,
    output: str,
):
    training.check_arguments(epochs, batch_size, patience, limit, seed, precision)
    recipe = recipe_of(iteration, epochs)
    folder = utils.output_folder(output, utils.MODEL.parent)
    run_folder = utils.output_folder(run, utils.RUNS / iteration)
    arguments = asdict(recipe) | {"batch_size": batch_size, "patience": patience, "limit": limit, "seed": seed}
    rows = training.read_rows(folder / "iterations.csv")
    unsaved = training.is_unsaved(run_folder, arguments, folder / "logs" / f"{iteration}.csv")
    recorded = not (again or unsaved) and training.is_recorded(rows, {"iteration": iteration} | arguments)
    if recorded:
        print(f"{utils.show_path(folder)} holds this run of {iteration}; --again trains it anew")
    if again and unsaved:
        print(f"{utils.show_path(run_folder)} holds this run, ended and not saved yet; delete it to train anew")

    if not recorded:
        faces, held_out = training.load_parts(data, limit, seed)
        training.distribute(batch_size)
        data_seen = training.fingerprint(faces, held_out)  # a run goes on with the faces that it began with
        training.start_run(run_folder, arguments | data_seen, again and not unsaved)
        if not training.has_ended(run_folder):
            keras.utils.set_random_seed(seed)
            keras.config.set_dtype_policy(training.recall_precision(run_folder, precision))
            network = build_model(recipe.architecture, side=None)
            keras.config.set_dtype_policy("float32")
            training.train(run_folder, network, recipe, faces, held_out, batch_size, seed, patience)
            if training.is_first():
                (run_folder / "finished").write_text(keras.backend.backend())

    if not recorded and keras.backend.backend() != "tensorflow":
        print(f"{utils.show_path(run_folder)} is trained; the same command with TensorFlow saves the model for OpenCV")
    elif not recorded:
        keras.utils.clear_session()  # so that the layers are numbered from one
        model = build_model(recipe.architecture)
        figures = training.finish(model, run_folder, recipe, faces, held_out)
        figures["backend"] = (run_folder / "finished").read_text()
        print(json.dumps(figures, indent=2))
        log = training.read_log(run_folder / "log.csv")
        with utils.locked(folder):
            save_results(folder, run_folder, model, {"iteration": iteration} | figures | arguments, log)
        print(f"the results are in {utils.show_path(folder)}")


if __name__ == "__main__":
    utils.run_script(main, parse_args)
