# Generated from notebooks/04_transfer_learning.ipynb by `make scripts`: edit the notebook, not this file.
"""Fine-tunes a CNN that was trained on ImageNet to read emotions, and saves it beside our own."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import shutil
import time

import cv2
import numpy as np

import utils
from scripts import train

with utils.quiet_tensorflow():
    import keras
    from keras import layers

INPUT_SIDE = 96  # pixels; the smallest side for which Keras has ImageNet's weights


def mobilenet_features(x):
    """MobileNetV2 without its top, on an enlarged face with its grey in three channels (arXiv:1801.04381)."""
    # Not layers.Resizing: its `training` is True by default, which becomes that of the layers after it, norms included.
    x = keras.ops.image.resize(x, (INPUT_SIDE, INPUT_SIDE))
    x = layers.Concatenate(name="three_channels")([x, x, x])
    network = keras.applications.MobileNetV2(input_tensor=x, include_top=False, weights=None)
    for layer in network.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.99  # Keras' 0.999 here averages over more steps than some stages have
    return network.output


train.ARCHITECTURES["mobilenet_v2"] = mobilenet_features


def pretrained_network(weights):
    """Return Keras' MobileNetV2 with the weights of ImageNet: downloaded, or from a file.

    Raises:
        InputError: there is no such file, it holds something else, or the download failed.
    """
    if weights != "imagenet" and not Path(weights).is_file():
        raise utils.InputError(f"no weights at {weights!r}; expected a .weights.h5 file, or imagenet to download them")
    shape = (INPUT_SIDE, INPUT_SIDE, 3)
    try:
        return keras.applications.MobileNetV2(input_shape=shape, include_top=False, weights=weights)
    except Exception as error:  # Keras raises a bare Exception for a failed download
        reason = str(error).split("\n")[0]
        what = "could not download" if weights == "imagenet" else f"{weights} does not hold"
        raise utils.InputError(
            f"{what} MobileNetV2's weights without its top ({reason}); give --weights such a .weights.h5 file"
        ) from None


def norms_of(model):
    """Return the batch norms of a model, from the input on."""
    return [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]


def give_statistics(model, faces, batch_size=64):
    """Set mean and variance of all batch norms to those of `faces`, and their gamma and beta so that nothing changes.

    Args:
        model: from `train.build_model`.
        faces: (n, side, side, 1) float32, 0 to 255, some hundred of them.
    """
    norms = norms_of(model)
    inputs = keras.Model(model.input, [norm.input for norm in norms])
    means, squares, axes = [0.0] * len(norms), [0.0] * len(norms), (0, 1, 2)
    for first in range(0, len(faces), batch_size):
        batch = faces[first : first + batch_size]
        for place, values in enumerate(inputs(batch, training=False)):
            moments = [keras.ops.convert_to_numpy(m).astype(np.float64) for m in keras.ops.moments(values, axes)]
            means[place] += moments[0] * len(batch) / len(faces)
            squares[place] += (moments[1] + moments[0] ** 2) * len(batch) / len(faces)
    for norm, mean, square in zip(norms, means, squares, strict=True):
        gamma, beta, old_mean, old_variance = norm.get_weights()
        variance = np.maximum(square - mean**2, 0)
        slope = gamma / np.sqrt(old_variance + norm.epsilon)
        new = slope * np.sqrt(variance + norm.epsilon), beta + slope * (mean - old_mean), mean, variance
        norm.set_weights([value.astype(np.float32) for value in new])


def starting_network(weights, faces, statistics=True):
    """Return the pre-trained network with a new head, to train at the side of the training's faces.

    Args:
        weights: see `pretrained_network`.
        faces: (n, 48, 48) uint8, for `give_statistics`.
        statistics: whether the batch norms get them.
    """
    model = train.build_model("mobilenet_v2", side=train.VIEW, name="pre_trained_model")
    train.grow(model, pretrained_network(weights))
    if statistics:
        give_statistics(model, train.look(faces))
    return model


COMMON = train.BASE | {
    "architecture": "mobilenet_v2", "augmentation": True, "noise": 0.3, "sharp": True, "first_side": train.VIEW,
    "optimizer": "adam", "weight_decay": 0.05, "precision": "float32",
}  # fmt: skip
STAGES = {
    "head": (
        {"start": "imagenet", "epochs": 2, "learning_rate": 3e-3, "frozen": "emotion"},
        "The features of objects as they are, and a linear layer on them.",
    ),
    "top": (
        {"start": "head", "epochs": 2, "learning_rate": 1e-3, "frozen": "block_13_expand"},
        "The last four of seventeen blocks, three quarters of the parameters, are trained too.",
    ),
    "all": (
        {
            "start": "top", "epochs": 14, "learning_rate": 1e-3, "label_smoothing": 0.05, "erasing": 0.25,
            "ema": 0.999, "strong_share": 0.8, "clean_norms": True,
        },
        "All is trained, with erasing, smoothed labels and a moving average of the weights, as in 03; in the end the "
        "batch norms get the statistics of faces as they are.",
    ),
    "taught": (
        {
            "start": "all", "epochs": 16, "cycles": 2, "learning_rate": 1e-3, "teacher": 0.6,
            "taught_by": "my_own_model.pkl", "erasing": 0.25, "mixup": 0.2, "ema": 0.999, "strong_share": 0.7,
            "clean_norms": True,
        },
        "Many labels are doubtful. The targets are blended with what our own CNN, which reads faces better, says of "
        "each face; in two cycles of the learning rate, whose ends are averaged, as in 03.",
    ),
}  # fmt: skip


def write_start(run, arguments, weights, faces, seed):
    """Make the folder of a run, as `train.finish_run` leaves it, from which the first stage starts."""
    if (run / "finished").is_file():
        train.start_run(run, arguments)  # which checks that they are the same
        return
    keras.utils.set_random_seed(seed)
    network = starting_network(weights, faces[:: max(1, len(faces) // 512)])
    train.start_run(run, arguments)  # not before the weights were there
    network.save_weights(run / "best.weights.h5")
    (run / "finished").write_text(keras.backend.backend())


NORMS = {
    "averages of the file, kept": (False, False),
    "averages of the file, trained on": (False, True),
    "statistics of faces, kept": (True, False),
    "statistics of faces, trained on": (True, True),
}


def compare_norms(weights, faces, held_out, seed, epochs=2, count=3000):
    """Train all of the network for some epochs on some faces, with its batch norms treated in four ways.

    Returns:
        The accuracy on the validation faces for each of NORMS.
    """
    images, labels = faces[0][:count], faces[1][:count]
    accuracies = {}
    for name, (statistics, trained) in NORMS.items():
        keras.utils.set_random_seed(seed)
        model = starting_network(weights, images[:512], statistics)
        for norm in norms_of(model):
            norm.trainable = trained
        batches = train.FaceBatches(images, labels, train.VIEW, min(64, len(images)), seed)
        train.compile_model(model, len(batches), epochs, epochs, 1e-3, 0.05, 0.0, 0.0, "adam")
        model.fit(batches, epochs=epochs, shuffle=False, verbose=0)
        if trained:
            train.recalibrate(model, train.look(images))  # after so few steps their averages lag behind
        said = model.predict(train.look(held_out[0]), batch_size=256, verbose=0)
        accuracies[name] = train.scores(said, held_out[1])[0]
        print(
            f"batch norms with the {name}: {accuracies[name]:.1%} after {epochs} epochs of {len(images)} faces",
            flush=True,
        )
    return accuracies


WHY = """\
- MobileNetV2 as Keras has it, without its top: 17 blocks of 1x1 convolutions and depthwise 3x3 convolutions.
- The middle 44x44 of a face's 48x48 pixels are enlarged to 96x96, inside the model: the first layers of MobileNetV2
  halve the resolution twice, and on 44 pixels the last maps would be 2x2.
- The grey is given as red, green and blue, since the first convolution knows colours only.
- The head is that of our own CNN: a mean over the map, dropout, and one weight per feature and emotion.
- The logits are divided by a temperature that was found on the validation faces."""


def architecture_text(model, rows, norms):
    """Return the text of pre_trained_model_architecture.txt: why, the stages, the batch norms, and the layers."""
    lines = ["WHY THIS ARCHITECTURE", "", WHY, "", "THE STAGES", ""]
    before = None
    for row in rows:
        lines += [f"{row['stage']}: {STAGES[row['stage']][1]}", *train.describe_row(row, before), ""]
        before = float(row["validation_accuracy"])
    lines += [
        "THE BATCH NORMS",
        "",
        "Accuracy on the validation faces after two epochs of 3,000 faces, all layers trained:",
    ]
    lines += [f"    {accuracy:.1%} with the {name}" for name, accuracy in norms.items()]
    lines += ["", "THE LAYERS", ""]
    model.summary(line_length=80, print_fn=lines.append)
    return "\n".join(lines)


def milliseconds_a_face(path, faces):
    """Return the median milliseconds that OpenCV takes for one of (n, 48, 48) uint8 faces, on one core."""
    net, threads, times = utils.EmotionNet(path), cv2.getNumThreads(), []
    cv2.setNumThreads(1)
    for face in faces:
        start = time.perf_counter()
        net.predict(face[None])
        times.append(1000 * (time.perf_counter() - start))
    cv2.setNumThreads(threads)
    return round(float(np.median(times)), 1)


def describe_model(path, held_out):
    """Return what a saved model costs and knows, and its probabilities for the validation faces, (n, 7) float32."""
    model = utils.load_model(path)
    probabilities = model.predict(held_out[0][..., None].astype(np.float32), batch_size=256, verbose=0)
    accuracy, cross_entropy = train.scores(probabilities, held_out[1])
    return {
        "validation_accuracy": accuracy,
        "validation_cross_entropy": cross_entropy,
        "parameters": model.count_params(),
        "megabytes": round(path.with_suffix(".tflite").stat().st_size / 1e6, 1),
        "milliseconds_a_face": milliseconds_a_face(path.with_suffix(".tflite"), held_out[0][:100]),
    }, probabilities


def beside_our_own(path, held_out):
    """Return what `describe_model` says of this model, of our own and, of what it applies to, their average."""
    pre_trained, first = describe_model(path, held_out)
    our_own, second = describe_model(utils.MODEL, held_out)
    average = (first + second) / 2
    costs = ("parameters", "megabytes", "milliseconds_a_face")
    accuracy, cross_entropy = train.scores(average, held_out[1])
    both = {"validation_accuracy": accuracy, "validation_cross_entropy": cross_entropy}
    both |= {name: round(pre_trained[name] + our_own[name], 1) for name in costs}
    return {"pre-trained": pre_trained, "our own": our_own, "average of both": both}, (first, second, average)


def parse_args(argv=None):
    """Parse the command line, `sys.argv[1:]` unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights",
        type=str,
        default="imagenet",
        help="imagenet, to download them, or a .weights.h5 file of MobileNetV2 without its top (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=0,
        help="passes over the images in the last two stages; 0 for the recipe's own number (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=128, help="images per step (default: %(default)s)")
    parser.add_argument(
        "--patience",
        type=int,
        default=20,
        help="epochs without a better validation loss after which a stage stops (default: %(default)s)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.1,
        help="share of the training images that is held out (default: %(default)s)",
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
        help="train although the results hold these very stages (default: %(default)s)",
    )
    parser.add_argument("--data", type=str, default="", help="folder with FER2013; empty for data")
    parser.add_argument(
        "--run", type=str, default="", help="folder for checkpoints and logs; empty for runs/pre_trained"
    )
    parser.add_argument(
        "--output",
        type=str,
        default="",
        help="folder for the results; empty for results/model, whose files are replaced",
    )
    return parser.parse_args(argv)


def main(
    weights: str,
    epochs: int,
    batch_size: int,
    patience: int,
    validation_fraction: float,
    limit: int,
    seed: int,
    again: bool,
    data: str,
    run: str,
    output: str,
):
    train.check_arguments(epochs, batch_size, patience, validation_fraction, limit, seed)
    keras.utils.set_random_seed(seed)
    parts = train.load_parts(data, limit, validation_fraction, seed)

    folder = Path(output) if output else utils.MODEL.parent
    table = folder / "pre_trained_stages.csv"
    rows = train.read_rows(table)
    given = {
        "batch_size": batch_size, "patience": patience, "validation_fraction": validation_fraction, "limit": limit,
        "seed": seed,
    }  # fmt: skip
    stages, before = {}, COMMON | given | {"weights": Path(weights).name}
    for stage, (changes, _) in STAGES.items():
        stages[stage] = COMMON | changes | given | ({"epochs": epochs} if epochs and not changes.get("frozen") else {})
    recorded = not again and all(train.is_recorded(rows, {"stage": stage} | stages[stage]) for stage in stages)
    run_folder = Path(run) if run else utils.RUNS / "pre_trained"
    if recorded:
        start = json.loads((folder / "pre_trained_model.json").read_text())["weights"]
        print(f"{utils.show_path(folder)} holds these stages, from {start}; --again trains them anew")
    elif keras.backend.backend() != "tensorflow":
        raise utils.InputError("only the TensorFlow backend can save the model: unset KERAS_BACKEND")
    else:
        if again and (run_folder / list(stages)[-1] / "finished").is_file():
            shutil.rmtree(run_folder)
        write_start(run_folder / "imagenet", before, weights, parts[0][0], seed)
        file = run_folder / "norms.json"
        if not file.is_file():
            compared = compare_norms(weights, *parts, seed)
            with utils.replacing(file) as path:
                path.write_text(json.dumps(compared))
        for stage, arguments in stages.items():
            print(f"stage {stage}", flush=True)
            train.finish_run(run_folder / stage, arguments, *parts, before)
            before = arguments

    if not recorded:
        past, rows = [], []
        for stage, arguments in stages.items():
            keras.utils.clear_session()  # so that the layers are numbered from one again
            network, figures, _ = train.measure_run(run_folder / stage, arguments, *parts, past, "pre_trained_model")
            past.append(train.read_log(run_folder / stage / "log.csv"))
            rows.append({"stage": stage, **figures, **arguments})
            with utils.replacing(folder / "logs" / f"pre_trained_{stage}.csv") as path:
                path.write_text((run_folder / stage / "log.csv").read_text())
        print(json.dumps(figures, indent=2))
        model_file = folder / utils.PRE_TRAINED_MODEL.name
        utils.save_model(network, model_file)
        norms, beside = json.loads((run_folder / "norms.json").read_text()), beside_our_own(model_file, parts[1])[0]
        report = {
            **figures, "norms": norms, "beside": beside, "keras": keras.__version__, "weights": Path(weights).name,
            "arguments": arguments,
        }  # fmt: skip
        with utils.replacing(model_file.with_suffix(".json")) as path:
            path.write_text(json.dumps(report, indent=2) + "\n")
        train.write_rows(table, rows)
    report = json.loads((folder / "pre_trained_model.json").read_text())
    keras.utils.clear_session()
    text = architecture_text(
        train.build_model("mobilenet_v2", name="pre_trained_model"), train.read_rows(table), report["norms"]
    )
    with utils.replacing(folder / "pre_trained_model_architecture.txt") as path:
        path.write_text(text + "\n", encoding="utf-8")
    print(f"the results are in {utils.show_path(folder)}")


if __name__ == "__main__":
    utils.run_script(main, parse_args)
