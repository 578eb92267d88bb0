# Generated from notebooks/04_transfer_learning.ipynb by `make scripts`: edit the notebook, not this file.
"""Fine-tunes a CNN that was trained on ImageNet to read emotions, and saves it beside our own."""

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

import numpy as np

import training
import utils
from training import keras, layers

INPUT_SIDE = 128  # pixels of the enlarged face, both sides; Keras has weights for 96, 128, 160, 192 and 224


def build_model(weights=None):
    """Build MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) for grey faces, with the head of our own network.

    Args:
        weights: imagenet to download them, a .weights.h5 file of MobileNetV2 without its top, or None for random ones.

    Returns:
        keras.Model: (n, 48, 48, 1) float32 raw grey, 0 to 255, to (n, 7) softmax in the order of utils.EMOTIONS.

    Raises:
        InputError: there is no such file, it holds something else, or the download failed.
    """
    if weights not in (None, "imagenet") and not Path(weights).is_file():
        raise utils.InputError(f"no weights at {weights!r}; expected a .weights.h5 file, or imagenet to download them")
    inputs = keras.Input((utils.SIDE, utils.SIDE, 1), name="face")
    x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    # Not layers.Resizing: it is in training unless told otherwise, and so would be the batch norms after it.
    x = keras.ops.image.resize(x, (INPUT_SIDE, INPUT_SIDE))
    x = layers.Concatenate(name="three_channels")([x, x, x])
    try:
        network = keras.applications.MobileNetV2(x.shape[1:], include_top=False, weights=weights, input_tensor=x)
    except Exception as error:  # Keras raises a bare Exception for a failed download
        reason = str(error).split("\n")[0]
        what = "could not download" if weights == "imagenet" else f"{weights} does not hold"
        raise utils.InputError(
            f"{what} MobileNetV2's weights without its top ({reason}); give --weights such a .weights.h5 file"
        ) from None
    for layer in network.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.99  # Keras' 0.999 here averages over more steps than the first stage has
    x = layers.GlobalAveragePooling2D(keepdims=True)(network.output)
    x = layers.Dropout(0.2)(x)
    x = layers.Conv2D(len(utils.EMOTIONS), 1, dtype="float32", name="emotion")(x)
    x = layers.GlobalAveragePooling2D(dtype="float32")(x)
    return keras.Model(inputs, layers.Softmax(dtype="float32")(x), name="pre_trained_model")


def give_statistics(model, faces):
    """Set mean and variance of all batch norms to those of faces, and their gamma and beta so that nothing changes.

    Args:
        model: from `build_model`.
        faces: (n, 48, 48, 1) float32, 0 to 255; a hundred do.
    """
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    inputs = keras.Model(model.input, [norm.input for norm in norms])(faces, training=False)
    for norm, values in zip(norms, inputs, strict=True):
        mean, variance = map(
            keras.ops.convert_to_numpy, keras.ops.moments(keras.ops.cast(values, "float32"), (0, 1, 2))
        )
        gamma, beta, old_mean, old_variance = norm.get_weights()
        slope = gamma / np.sqrt(old_variance + norm.epsilon)
        norm.set_weights([slope * np.sqrt(variance + norm.epsilon), beta + slope * (mean - old_mean), mean, variance])


BASE = training.Recipe(
    architecture=f"mobilenet_v2 at {INPUT_SIDE} pixels", small_share=0.0, augmented=True, camera=0.3,
    optimizer="adamw", learning_rate=1e-3, weight_decay=0.05,
)  # fmt: skip
STAGES = {
    "head": replace(BASE, epochs=2, learning_rate=3e-3),
    "all": replace(BASE, epochs=24, erasing=0.25, smoothing=0.05, average=0.999),
}
QUESTIONS = {
    "head": "What are the features of objects worth for faces? Only the new layers are trained.",
    "all": "What is gained when the features are trained too?",
}

WHY = """\
- MobileNetV2 as Keras has it, without its top: 17 blocks of 1x1 convolutions and depthwise 3x3 convolutions.
- The face is enlarged inside the model: MobileNetV2 halves the resolution five times, and of 48 pixels 2 would be left.
- The grey is given as red, green and blue, since the first convolution knows colours only.
- The head is that of our own CNN: a mean over the map, dropout, and one weight per feature and emotion.
- No layer is there that OpenCV's dnn cannot run exactly: the live stream starts without TensorFlow.
- The logits are divided by a temperature that was found on the validation faces."""


def plot_stages(rows, logs):
    """Return a matplotlib figure of the stages, one after another, from their rows and logs; see training.read_log."""
    joined = {name: sum((log[name] for log in logs), []) for name in ("loss", "accuracy", "val_loss", "val_accuracy")}
    joined["epoch"] = list(range(1, len(joined["loss"]) + 1))
    spans, last = {}, 0
    for row, log in zip(rows, logs, strict=True):
        before, last = last, last + len(log["loss"])
        spans[f"stage {row['stage']}"] = before, last
    figure = training.plot_learning_curves(joined, before + int(row["best_epoch"]), spans)
    figure.suptitle("Each stage goes on from the best weights of the one before")
    return figure


def save_results(folder, run, model, rows):
    """Save what the stages in the folder `run` gave in the folder of the results; the table last, when all is there."""
    utils.save_model(model, folder / utils.PRE_TRAINED_MODEL.name)
    with utils.replacing(folder / "pre_trained_model.json") as path:
        path.write_text(json.dumps(rows[-1], indent=2) + "\n")
    with utils.replacing(folder / "pre_trained_model_architecture.txt") as path:
        told = "THE STAGES", "Each goes on from the best weights of the one before, the first from those of ImageNet."
        path.write_text(training.architecture_text(WHY, *told, rows, BASE, QUESTIONS, model), encoding="utf-8")
    for row in rows:
        with utils.replacing(folder / "logs" / f"pre_trained_{row['stage']}.csv") as path:
            shutil.copy(run / row["stage"] / "log.csv", path)
    logs = [training.read_log(run / row["stage"] / "log.csv") for row in rows]
    training.save_plot(folder / "pre_trained_learning_curves.png", plot_stages, rows, logs)
    training.write_rows(folder / "pre_trained_stages.csv", rows)


def parse_args(argv=None):
    """Parse the command line, `sys.argv[1:]` unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights", type=str, default="imagenet", help="imagenet, or a .weights.h5 file (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=int, default=0, help="of the last stage; 0 for the recipe's own number (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="images per step (default: %(default)s)")
    parser.add_argument(
        "--patience", type=int, default=20, help="epochs without a better loss until it stops (default: %(default)s)"
    )
    parser.add_argument(
        "--precision", type=str, default="", help="float32 or mixed_bfloat16 in training; empty for what is faster here"
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
        help="train even if the results hold these stages already (default: %(default)s)",
    )
    parser.add_argument("--data", type=str, default="", help="folder with FER2013; empty for data")
    parser.add_argument(
        "--run", type=str, default="", help="folder for checkpoints and logs; empty for runs/pre_trained"
    )
    parser.add_argument(
        "--output", type=str, default="", help="folder for results; empty for results/model, whose files are replaced"
    )
    return parser.parse_args(argv)


def main(
    weights: str,
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
    folder = utils.output_folder(output, utils.MODEL.parent)
    run_folder = utils.output_folder(run, utils.RUNS / "pre_trained")
    recipes = STAGES | ({"all": replace(STAGES["all"], epochs=epochs)} if epochs else {})
    given = {"batch_size": batch_size, "patience": patience, "limit": limit, "seed": seed}
    arguments = {stage: {"stage": stage} | asdict(recipe) | given for stage, recipe in recipes.items()}
    table = training.read_rows(folder / "pre_trained_stages.csv")
    start = {"weights": Path(weights).name}
    asked = {} if weights == "imagenet" else start  # recorded stages are read although they began from a file
    unsaved = training.is_unsaved(run_folder / "all", arguments["all"] | start, folder / "logs" / "pre_trained_all.csv")
    recorded = not (again or unsaved) and all(training.is_recorded(table, row | asked) for row in arguments.values())
    if recorded:
        print(f"{utils.show_path(folder)} holds these stages; --again trains them anew")
    if again and unsaved:
        print(f"{utils.show_path(run_folder)} holds these stages, ended and not saved yet; delete it to train anew")
    arguments = {stage: row | start for stage, row in arguments.items()}

    if not recorded:
        faces, held_out = training.load_parts(data, limit, seed)
        anew = again and not unsaved and training.has_ended(run_folder / "all")
        is_begun = not anew and training.has_ended(run_folder / "head")
        keras.utils.set_random_seed(seed)
        keras.config.set_dtype_policy(training.recall_precision(run_folder / "head", precision))
        network = build_model(None if is_begun else weights)
        keras.config.set_dtype_policy("float32")
        if not is_begun:
            give_statistics(network, training.plain_faces(faces[0][:128]))
        for stage in reversed(recipes):  # the last one first: without it the others are not trained anew twice
            training.start_run(run_folder / stage, arguments[stage] | training.fingerprint(faces, held_out), anew)
        stage_folder = None
        for stage, recipe in recipes.items():
            before, stage_folder = stage_folder, run_folder / stage
            if not training.has_ended(stage_folder):
                print(f"stage {stage}", flush=True)
                if before:
                    training.load_weights(network, before)
                for layer in network.layers:
                    layer.trainable = stage != "head" or layer.name == "emotion"
                training.train(stage_folder, network, recipe, faces, held_out, batch_size, seed, patience)
                (stage_folder / "finished").write_text(keras.backend.backend())

    if not recorded and keras.backend.backend() != "tensorflow":
        print(f"{utils.show_path(run_folder)} is trained; the same command with TensorFlow saves the model for OpenCV")
    elif not recorded:
        keras.utils.clear_session()  # so that the layers are numbered from one
        model, rows = build_model(), []
        for stage, recipe in recipes.items():
            figures = training.finish(model, run_folder / stage, recipe, faces, held_out)
            figures["backend"] = (run_folder / stage / "finished").read_text()
            rows.append({"stage": stage} | figures | arguments[stage])
        print(json.dumps(figures, indent=2))
        with utils.locked(folder):
            save_results(folder, run_folder, model, rows)
        print(f"the results are in {utils.show_path(folder)}")


if __name__ == "__main__":
    utils.run_script(main, parse_args)
