# Generated from notebooks/03_cnn_iterations.ipynb by `make scripts`: edit the notebook, not this file.
"""Trains a CNN from scratch on the training rows of FER2013 and saves it for the other scripts."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import utils

with utils.quiet_tensorflow():
    import keras
    from keras import layers


def augment(image, rng):
    """Return a randomly changed copy of a face.

    Args:
        image: (48, 48) uint8.
        rng: numpy Generator.

    Returns:
        (48, 48) float32, 0 to 255.
    """
    centre = (utils.SIDE - 1) / 2
    matrix = cv2.getRotationMatrix2D((centre, centre), rng.uniform(-15, 15), rng.uniform(0.85, 1.2))
    matrix[:, 2] += rng.uniform(-4, 4, 2)
    if rng.random() < 0.5:
        matrix = matrix @ np.array([[-1, 0, 2 * centre], [0, 1, 0], [0, 0, 1]])
    warped = cv2.warpAffine(image, matrix, (utils.SIDE, utils.SIDE), borderMode=cv2.BORDER_REFLECT).astype(np.float32)
    mean = warped.mean()
    return np.clip((warped - mean) * rng.uniform(0.75, 1.3) + mean + rng.normal(0, 15), 0, 255)


class FaceBatches(keras.utils.PyDataset):
    """Batches of augmented faces, in an order and with changes that depend on the seed and the epoch alone.

    Each item is a pair: (b, 48, 48, 1) float32 images from 0 to 255, and (b, 7) float32 one-hot labels.
    """

    def __init__(self, images, labels, batch_size, seed):
        super().__init__(workers=1)
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.targets = keras.utils.to_categorical(labels, len(utils.EMOTIONS))
        self.start_epoch(0)

    def start_epoch(self, epoch):
        self.epoch = epoch
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))

    def __len__(self):
        return max(1, len(self.images) // self.batch_size)  # an incomplete batch waits for the next epoch's shuffle

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, self.epoch, index])
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        faces = np.stack([augment(self.images[i], rng) for i in chosen])
        return faces[..., None], self.targets[chosen]


def residual_block(x, width, stride):
    """Two 3x3 convolutions with batch norm around a shortcut, halving the resolution if `stride` is 2."""
    shortcut = x
    x = layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    if shortcut.shape != x.shape:
        shortcut = layers.Conv2D(width, 1, stride, padding="same", use_bias=False)(shortcut)
        shortcut = layers.BatchNormalization()(shortcut)
    return layers.ReLU()(layers.Add()([x, shortcut]))


def build_model(widths=(32, 64, 128, 256), dropout=0.3):
    """Build the CNN: (n, 48, 48, 1) float32 raw grey, 0 to 255, to (n, 7) softmax in the order of utils.EMOTIONS."""
    inputs = keras.Input((utils.SIDE, utils.SIDE, 1), name="face")
    x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = layers.Cropping2D(2)(x)
    x = layers.Conv2D(widths[0], 3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    for stage, width in enumerate(widths):
        x = residual_block(x, width, stride=1 if stage == 0 else 2)
    x = layers.GlobalAveragePooling2D(keepdims=True)(x)
    x = layers.Dropout(dropout)(x)
    x = layers.Conv2D(len(utils.EMOTIONS), 1, dtype="float32", name="emotion")(x)
    x = layers.GlobalAveragePooling2D(dtype="float32")(x)
    outputs = layers.Softmax(dtype="float32")(x)
    return keras.Model(inputs, outputs, name="my_own_model")


def compile_model(model, steps, epochs, learning_rate, weight_decay, label_smoothing):
    """Compile `model` with the optimiser, the schedule over `epochs` of `steps`, the loss and the metric."""
    warm_up = min(2, epochs / 4) * steps
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, epochs * steps - warm_up, warmup_target=learning_rate, warmup_steps=warm_up
    )
    optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, weight_decay=weight_decay, clipnorm=5.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=label_smoothing)
    model.compile(optimizer, loss, metrics=["accuracy"])


class SeedEpoch(keras.callbacks.Callback):
    """Makes the randomness of an epoch depend on the seed and the epoch alone: order, augmentation and dropout.

    A checkpoint holds no state of random generators, so a resumed run would go another way without this.
    """

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.start_epoch(epoch)
        for layer in self.model.layers:
            if isinstance(layer, layers.Dropout):
                layer.seed_generator.state.assign([self.batches.seed, epoch])


def callbacks_for(run, batches, patience):
    """Return the callbacks of a run whose checkpoints and logs are in the folder `run`, resuming what is there.

    EarlyStopping keeps no checkpoint: it counts its patience from where a run goes on.
    """
    log = run / "log.csv"
    losses = pd.read_csv(log)["val_loss"] if log.is_file() else pd.Series(dtype=float)
    best = None if losses.empty else losses.min()
    callbacks = [
        keras.callbacks.BackupAndRestore(run / "backup", delete_checkpoint=False),
        SeedEpoch(batches),
        keras.callbacks.CSVLogger(log, append=True),
        keras.callbacks.ModelCheckpoint(
            run / "best.weights.h5", save_best_only=True, save_weights_only=True, initial_value_threshold=best
        ),
        keras.callbacks.EarlyStopping(patience=patience),
    ]
    if keras.backend.backend() == "tensorflow":  # the TensorBoard callback writes with TensorFlow
        callbacks.append(keras.callbacks.TensorBoard(run / "tensorboard"))
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


def plot_learning_curves(history):
    """Return a figure of loss and accuracy over the epochs of a log with the columns that CSVLogger writes."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    epochs = history["epoch"] + 1
    best = epochs[history["val_loss"].idxmin()]
    for axis, name, unit in zip(axes, ("loss", "accuracy"), ("cross-entropy, nats", "share of images"), strict=True):
        axis.plot(epochs, history[name], "--", color="0.5", label="training (augmented, with dropout)")
        axis.plot(epochs, history[f"val_{name}"], "-", color="black", label="validation")
        axis.axvline(best, linestyle=":", color="black", label=f"weights kept: epoch {best}")
        axis.axvline(epochs.iloc[-1], linestyle="-.", color="0.7", label=f"training stopped: epoch {epochs.iloc[-1]}")
        axis.set_xlabel("epoch")
        axis.set_ylabel(f"{name} ({unit})")
        axis.grid(alpha=0.3)
    axes[1].legend()
    figure.suptitle("Learning curves of the CNN trained from scratch")
    return figure


def parse_args(argv=None):
    """Parse the command line, `sys.argv[1:]` unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step (default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=0.1, help="its peak, after two epochs of warm-up (default: %(default)s)"
    )
    parser.add_argument(
        "--weight-decay",
        type=float,
        default=0.005,
        help="decoupled, as Keras applies it; about 0.0005 as an L2 term under momentum 0.9 (default: %(default)s)",
    )
    parser.add_argument(
        "--label-smoothing",
        type=float,
        default=0.05,
        help="share of the target that is spread over all classes (default: %(default)s)",
    )
    parser.add_argument(
        "--patience",
        type=int,
        default=15,
        help="epochs without a better validation loss after which training stops (default: %(default)s)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.1,
        help="share of the training images that is held out (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        type=str,
        default="mixed_bfloat16",
        help="of the arithmetic while training; or float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="use this many training images only; 0 for all (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the split, the weights and the augmentation (default: %(default)s)"
    )
    parser.add_argument("--data", type=str, default="", help="folder with FER2013; empty for data")
    parser.add_argument(
        "--run", type=str, default="", help="folder for checkpoints and logs; empty for runs/my_own_model"
    )
    parser.add_argument(
        "--output",
        type=str,
        default="",
        help="folder for the results; empty for results/model, whose files are replaced",
    )
    return parser.parse_args(argv)


def main(
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    label_smoothing: float,
    patience: int,
    validation_fraction: float,
    precision: str,
    limit: int,
    seed: int,
    data: str,
    run: str,
    output: str,
):
    if epochs < 1 or batch_size < 1 or patience < 1 or not 0 < validation_fraction < 1:
        raise utils.InputError(
            "expected epochs, batch_size and patience of 1 or more, validation_fraction between 0 and 1"
        )
    if not 0 < learning_rate < 10 or not 0 <= label_smoothing < 1 or not 0 <= weight_decay < 1:
        raise utils.InputError(
            "expected a learning_rate between 0 and 10, label_smoothing and weight_decay from 0 to 1"
        )
    if limit < 0 or not 0 <= seed < 2**32:
        raise utils.InputError(f"limit is {limit} and seed {seed}; expected 0 or more")
    if precision not in ("float32", "mixed_bfloat16", "mixed_float16"):
        raise utils.InputError(f"precision is {precision!r}; expected float32, mixed_bfloat16 or mixed_float16")
    keras.utils.set_random_seed(seed)
    images, labels = utils.load_fer2013("train", data or None)
    if limit:
        images, labels = images[:limit], labels[:limit]
    train, validation = utils.split_validation(images, labels, validation_fraction, seed)
    if not len(train) or not len(validation):
        raise utils.InputError(
            f"{len(images)} images are too few to hold out {validation_fraction:.0%}; expected a hundred or more"
        )
    print(f"{len(train)} images to train on, {len(validation)} to validate on")

    run_folder = Path(run) if run else utils.RUNS / "my_own_model"
    arguments = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "label_smoothing": label_smoothing,
        "patience": patience,
        "validation_fraction": validation_fraction,
        "precision": precision,
        "limit": limit,
        "seed": seed,
    }
    start_run(run_folder, arguments)

    batches = FaceBatches(images[train], labels[train], batch_size, seed)
    held_out = images[validation][..., None].astype(np.float32)
    held_out_targets = keras.utils.to_categorical(labels[validation], len(utils.EMOTIONS))

    keras.config.set_dtype_policy(precision)
    model = build_model()
    compile_model(model, len(batches), epochs, learning_rate, weight_decay, label_smoothing)
    finished = run_folder / "finished"
    if finished.is_file():
        print(f"{utils.show_path(run_folder)} was trained to its end before; delete it to train again")
    else:
        model.fit(
            batches,
            validation_data=(held_out, held_out_targets),
            validation_batch_size=256,
            epochs=epochs,
            shuffle=False,  # FaceBatches shuffles, by epoch, so that a resumed run sees the same order
            callbacks=callbacks_for(run_folder, batches, patience),
            verbose=1 if sys.stdout.isatty() else 2,
        )
        finished.touch()

    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session()  # so that the layers are numbered from one again
    final = build_model()
    final.load_weights(run_folder / "best.weights.h5")
    history = pd.read_csv(run_folder / "log.csv")
    best = history.loc[history["val_loss"].idxmin()]
    probabilities = final.predict(held_out, batch_size=256, verbose=0)
    accuracy = float((probabilities.argmax(axis=1) == labels[validation]).mean())
    folder = Path(output) if output else utils.MODEL.parent
    report = {
        "arguments": arguments,
        "train_images": len(train),
        "validation_images": len(validation),
        "parameters": final.count_params(),
        "epochs_trained": len(history),
        "best_epoch": int(best["epoch"]) + 1,
        "validation_accuracy": round(accuracy, 4),
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
    }
    print(json.dumps({name: value for name, value in report.items() if name != "arguments"}, indent=2))

    figure = plot_learning_curves(history)

    summary = []
    final.summary(line_length=110, print_fn=summary.append)
    utils.save_model(final, folder / "my_own_model.pkl")
    utils.save_fig(figure, folder / "learning_curves.png")
    with utils.replacing(folder / "my_own_model_log.csv") as path:
        history.to_csv(path, index=False)
    for name, text in {
        "my_own_model.json": json.dumps(report, indent=2) + "\n",
        "my_own_model_architecture.txt": "\n".join(summary) + "\n",
    }.items():
        with utils.replacing(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    print(f"the model is in {utils.show_path(folder)}")


if __name__ == "__main__":
    utils.run_script(main, parse_args)
