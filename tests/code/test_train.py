"""`python scripts/train.py`, as a user runs it, on a data set of noise that takes seconds."""

import json

import numpy as np
import pandas as pd
import pytest

import utils
from tests.conftest import assert_one_clear_line, load_script

SMALL = ["--batch-size", 32, "--precision", "float32"]


@pytest.fixture(scope="module")
def train_module():
    """scripts/train.py as a module."""
    return load_script("train")


@pytest.fixture
def train(run_script, small_fer2013, tmp_path):
    def run(*arguments, run="run", data=small_fer2013, environment=None):
        folders = ["--data", data, "--run", tmp_path / run, "--output", tmp_path / "model"]
        return run_script("train.py", *SMALL, *folders, *arguments, timeout=900, **environment or {})

    return run


def test_trains_saves_and_reports_and_never_opens_the_test_rows(train, train_module, small_fer2013, tmp_path):
    """The final iteration, and before it the four that led to the network beside it, the last of them in three cycles.

    train.csv is enough for it, and broken files with the test rows beside it harm nothing.
    """
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_bytes((small_fer2013 / "train.csv").read_bytes())
    for name in ("icml_face_data.csv", "test.csv", "test_with_emotions.csv"):
        (data / name).write_text("this would be an error if somebody read it")
    process = train("--epochs", 6, run="my_own_model", data=data)
    assert process.returncode == 0, process.stderr
    assert [path.name for path in (data / "cache").iterdir()] == ["train.npz"]
    assert process.stdout.count("min left") == 5 * 6
    assert all((tmp_path / name / "finished").is_file() for name in ("long", "grown", "cycles", "taught"))
    first = pd.read_csv(tmp_path / "long" / "log.csv")
    assert first["loss"].iloc[-1] < first["loss"].iloc[0]
    results = tmp_path / "model"
    names = {path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()}
    assert names == {
        "my_own_model.pkl", "my_own_model.tflite", "my_own_model.json", "my_own_model_architecture.txt",
        "learning_curves.png", "iterations.csv", "logs/final.csv",
    }  # fmt: skip
    log = pd.read_csv(results / "logs" / "final.csv")
    assert len(log) == 6 and (log["seconds"] > 0).all()
    assert list((tmp_path / "my_own_model" / "tensorboard").rglob("events.*"))
    report = json.loads((results / "my_own_model.json").read_text())
    assert report["arguments"]["epochs"] == report["epochs_trained"] == 6
    columns = ["this run's column alone", "that of taught alone"]
    others = ["with the view of the training", "with kernels of full rank"]
    assert list(report["made_of"]) == ["batch norms of the training", *columns, *others]
    row = pd.read_csv(results / "iterations.csv").set_index("iteration").loc["final"]
    assert row["validation_accuracy"] == report["validation_accuracy"] and row["architecture"] == "pooled"
    faces = np.random.default_rng(0).integers(0, 256, (3, 48, 48)).astype(np.uint8)
    expected = utils.load_model(results / "my_own_model.pkl").predict(faces[..., None] * 1.0, verbose=0)
    net = utils.EmotionNet(results / "my_own_model.tflite")
    assert net.predict(faces) == pytest.approx(expected, abs=1e-5)
    text = (results / "my_own_model_architecture.txt").read_text(encoding="utf-8")
    assert "Rescaling" in text and f"{report['validation_accuracy']:.1%}" in text
    assert f"epoch {row['best_epoch']} of 6 kept, beside the network of taught" in text

    saved = train("--epochs", 6, "--iteration", "taught", run="taught", data=data)
    assert saved.returncode == 0 and "was trained to its end before" in saved.stdout
    text = (results / "my_own_model_architecture.txt").read_text(encoding="utf-8")
    assert "the mean of the epochs 2, 4, 6 of 6 kept, with the ends of cycles in the mean" in text
    log = pd.read_csv(results / "logs" / "taught.csv")
    assert (log["learning_rate"][1::2] < log["learning_rate"][0::2].min() / 2).all()  # low at the end of each cycle

    # One goes on from the final one, with more faces. Its targets are what both columns say, its first stages stay.
    refit = train("--epochs", 6, "--iteration", "refit_pooled", run="refit_pooled", data=data)
    assert refit.returncode == 0 and refit.stdout.count("min left") == 6, refit.stderr
    row = pd.read_csv(results / "iterations.csv").set_index("iteration").loc["refit_pooled"]
    images, labels = utils.load_fer2013("train", data)
    faces, held_out = utils.split_validation(images, labels, 0.03, 0)
    assert row["validation_images"] == len(held_out) < report["validation_images"]
    side, seen = train_module.VIEW, train_module.look(images[faces])
    start, beside = (train_module.network_of(name, tmp_path, side, seen) for name in ("final", "taught"))
    said = [net.predict(view, verbose=0) for net in (start, beside) for view in (seen, seen[:, :, ::-1])]
    assert np.load(tmp_path / "refit_pooled" / "said.npy") == pytest.approx(np.mean(said, axis=0), abs=1e-4)
    pair = np.prod([net.predict(train_module.look(images[held_out]), verbose=0) for net in (start, beside)], axis=0)
    assert row["accuracy_before"] == pytest.approx((pair.argmax(axis=1) == labels[held_out]).mean(), abs=1e-3)
    end = train_module.build_model("pooled", side=side)
    end.load_weights(tmp_path / "refit_pooled" / "best.weights.h5")
    for stage, stays in (("stage0a", True), ("stage1b", True), ("stage2a", False), ("stage3c", False)):
        kernels = [net.get_layer(f"{stage}_convolution").get_weights()[0] for net in (start, end)]
        assert (kernels[0] == kernels[1]).all() == stays


def test_a_run_needs_what_it_starts_from_and_what_stands_beside_it(train_module):
    """Each is trained once, after what it needs itself; what only tried to better the final one is no part of it."""
    to_final = ["long", "grown", "cycles", "taught", "final"]
    assert train_module.history_of("final") == to_final
    assert train_module.history_of("refit_residual") == [*to_final, "refit_residual"]


def test_a_slow_precision_is_found_out(train_module):
    """Twice the bytes take longer; float32 is as fast as itself, within what a busy machine makes of it."""
    assert train_module.times_slower("float64") > 1.1
    assert 0.2 < train_module.times_slower("float32") < 3


def test_a_recorded_run_is_trained_again_only_if_asked(train, tmp_path):
    """An earlier iteration gets its row and log, and leaves the model alone; another split is another run."""
    assert train("--epochs", 1, "--iteration", "plain").returncode == 0
    assert not list((tmp_path / "model").glob("my_own_model*"))
    again = train("--epochs", 1, "--iteration", "plain")
    assert again.returncode == 0 and "holds this run of plain" in again.stdout and "epoch 1:" not in again.stdout
    other = train("--epochs", 1, "--iteration", "plain", "--again")
    assert other.returncode == 0 and "epoch 1:" in other.stdout
    assert train("--epochs", 1, "--iteration", "vgg", "--validation-fraction", 0.3, run="vgg").returncode == 0
    rows = pd.read_csv(tmp_path / "model" / "iterations.csv").set_index("iteration")
    assert rows.index.tolist() == ["plain", "vgg"]
    assert rows["validation_images"].tolist() == [21, 63] and rows["train_images"].tolist() == [189, 147]
    more = train("--epochs", 1, "--iteration", "vgg", "--validation-fraction", 0.2, run="vgg")
    assert_one_clear_line(more, "another validation_fraction")


def test_a_run_that_was_stopped_goes_on_to_the_same_result(train, train_module, small_fer2013, tmp_path):
    """Pull the plug after the first epoch of three; log and averaged weights in the end are those of a whole run."""
    epochs = ["--iteration", "long", "--epochs", 3, "--batch-size", 8]  # steps enough for averaged weights
    whole = train(*epochs, run="whole")
    assert (
        whole.returncode == 0
        and json.loads(whole.stdout[whole.stdout.index("{") : whole.stdout.index("}") + 1])["ema_used"] > 0.5
    )
    import keras

    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('PULL_THE_PLUG'):\n"
        "    import keras\n"
        "    class Plug(keras.callbacks.Callback):\n"
        "        def on_epoch_begin(self, epoch, logs=None):\n"
        "            if epoch == 1:\n"
        "                os._exit(9)\n"
        "    fit = keras.Model.fit\n"
        "    keras.Model.fit = lambda *a, callbacks, **k: fit(*a, callbacks=[*callbacks, Plug()], **k)\n"
    )
    environment = {"PULL_THE_PLUG": "1", "PYTHONPATH": str(tmp_path)}
    stopped = train(*epochs, "--again", run="stopped", environment=environment)
    assert stopped.returncode == 9
    assert len(pd.read_csv(tmp_path / "stopped" / "log.csv")) == 1
    with open(tmp_path / "stopped" / "log.csv", "a") as log:
        log.write("1,0,0,9,9,0,9\n")  # and as if it was pulled between the log and the checkpoint once more
    assert train(*epochs, "--again", run="stopped").returncode == 0
    whole, resumed = (pd.read_csv(tmp_path / run / "log.csv") for run in ("whole", "stopped"))
    assert resumed["epoch"].tolist() == [0, 1, 2]
    assert resumed["loss"].to_numpy() == pytest.approx(whole["loss"].to_numpy(), rel=1e-3)
    assert resumed["val_loss"].to_numpy() == pytest.approx(whole["val_loss"].to_numpy(), rel=1e-3)

    model = train_module.build_model()
    model.load_weights(tmp_path / "stopped" / "best.weights.h5")
    model.compile(loss=keras.losses.CategoricalCrossentropy(label_smoothing=0.05))
    images, labels = utils.load_fer2013("train", small_fer2013)
    validation = utils.split_validation(images, labels)[1]
    faces, targets = images[validation][..., None].astype(np.float32), np.eye(7)[labels[validation]]
    loss = model.evaluate(faces, targets, verbose=0)
    assert loss == pytest.approx(whole["val_loss"].iloc[2], rel=1e-3)  # the third epoch alone has full-size faces


def test_the_columns_of_a_network_are_averaged(train_module, tmp_path):
    """The joined network says what the mean of both logits says, in Keras and in OpenCV."""
    faces = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 1)).astype(np.float32)
    columns = [train_module.build_model(name) for name in ("pooled", "grown")]
    for seed, column in enumerate(columns):
        train_module.recalibrate(column, faces)
        weights = column.get_layer("emotion").get_weights()
        column.get_layer("emotion").set_weights([3 * weights[0], np.random.default_rng(seed).normal(size=7)])
    joined = train_module.build_model("pooled", beside="grown")
    train_module.join_columns(joined, columns)
    expected = np.prod([column.predict(faces, verbose=0) for column in columns], axis=0) ** 0.5
    expected /= expected.sum(axis=1, keepdims=True)
    assert np.ptp(expected, axis=1).min() > 0.05
    assert joined.predict(faces, verbose=0) == pytest.approx(expected, abs=1e-5)
    utils.save_model(joined, tmp_path / "joined.pkl")
    net = utils.EmotionNet(tmp_path / "joined.tflite")
    assert net.predict(faces[..., 0].astype(np.uint8)) == pytest.approx(expected, abs=1e-5)


def test_kernels_of_a_lower_rank_say_nearly_the_same(train_module):
    """Of the full rank they say exactly the same, and of half of it they are closer than halves taken by chance."""
    rng = np.random.default_rng(0)
    faces = rng.integers(0, 256, (48, 48, 48, 1)).astype(np.float32)
    whole = train_module.build_model("pooled", beside="grown")
    for layer in whole.layers:
        if layer.name.endswith("_norm"):
            gamma, beta, mean, variance = layer.get_weights()
            beta, mean = rng.normal(0, 0.5, (2, len(beta)))
            layer.set_weights([gamma * rng.uniform(-1.5, 1.5, len(gamma)), beta, mean, variance])
    expected = np.log(whole.predict(faces, verbose=0))
    far = {}
    for share in (1.0, 0.5):
        wide = train_module.wide_convolutions(whole)
        ranks = {name: round(share * whole.get_layer(f"{name}_convolution").filters) for name in wide}
        model = train_module.lower_rank(whole, ranks)
        by_chance = np.abs(np.log(model.predict(faces, verbose=0)) - expected).mean()
        train_module.fit_low_rank(model, whole, faces[::2])
        far[share] = np.abs(np.log(model.predict(faces, verbose=0)) - expected).mean()
        assert far[share] < 0.2 * by_chance
    assert far[1.0] < 1e-4 < far[0.5]
    names = {layer.name: layer for layer in model.layers}
    assert names["stage3a_convolution"].filters == 160 and names["stage3a_mix"].filters == 320
    assert names["block4a_convolution"].strides == (2, 2) and "block4a_norm" not in names
    assert names["stage2c_convolution"].filters == 128 and "stage2c_norm" in names
    assert model.count_params() < 0.7 * whole.count_params()


def test_a_grown_network_starts_where_the_one_before_ended(train_module):
    """A block more, and the same probabilities to the bit; the block can learn nevertheless."""
    import keras

    keras.utils.set_random_seed(0)
    faces = np.random.default_rng(0).integers(0, 256, (3, 44, 44, 1)).astype(np.float32)
    start, grown = (train_module.build_model(name, side=44) for name in ("residual", "grown"))
    for layer in start.layers:
        if layer.name.endswith("_norm"):  # as after a training: none is at its first value
            layer.set_weights([weights + 0.1 for weights in layer.get_weights()])
    train_module.grow(grown, start)
    assert grown.count_params() > start.count_params()
    assert (grown.predict(faces, verbose=0) == start.predict(faces, verbose=0)).all()
    assert (grown.get_layer("block0b_norm").gamma.numpy() == 0).all()
    grown.compile(keras.optimizers.SGD(0.1), "categorical_crossentropy")
    grown.train_on_batch(faces, np.eye(7)[:3])
    assert np.abs(grown.get_layer("block0b_norm").gamma.numpy()).max() > 0


def test_the_batch_norm_of_the_training_is_the_one_of_keras(train_module):
    """The same outputs and moving averages, in one kernel."""
    import keras

    inputs = np.random.default_rng(0).normal(3, 2, (16, 6, 6, 4)).astype(np.float32)
    ours, theirs = train_module.BatchNormalization(), keras.layers.BatchNormalization()
    for _ in range(3):
        outputs = [keras.ops.convert_to_numpy(layer(inputs, training=True)) for layer in (ours, theirs)]
        assert outputs[0] == pytest.approx(outputs[1], abs=1e-4)
    for own, keras_own in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        assert own == pytest.approx(keras_own, rel=3e-3)  # one divides by n - 1, the other by n
    outputs = [keras.ops.convert_to_numpy(layer(inputs)) for layer in (ours, theirs)]
    assert outputs[0] == pytest.approx(outputs[1], rel=3e-3, abs=1e-2)


def test_batch_norms_get_the_statistics_of_faces_as_they_are(train_module):
    """After that a network says of these faces what it says of them in training, and no weight has changed."""
    import keras

    keras.utils.set_random_seed(0)
    faces = np.random.default_rng(0).integers(0, 256, (8, 44, 44, 1)).astype(np.float32)
    model = train_module.build_model("vgg", dropout=0.0, side=44)
    before = [weight.numpy() for weight in model.trainable_weights]
    expected = keras.ops.convert_to_numpy(model(faces, training=True))
    train_module.recalibrate(model, faces)
    assert model.predict(faces, verbose=0) == pytest.approx(expected, abs=5e-3)
    assert all((old == new.numpy()).all() for old, new in zip(before, model.trainable_weights, strict=True))
    first = next(layer for layer in model.layers if layer.name.endswith("_norm"))
    whole = first.moving_mean.numpy()
    train_module.recalibrate(model, faces, batch_size=3)  # and the mean of the batches, the last one smaller, is theirs
    assert first.moving_mean.numpy() == pytest.approx(whole, abs=1e-4)
    assert first.momentum == train_module.layers.BatchNormalization().momentum


def test_the_mean_of_weights_is_loaded(train_module, tmp_path):
    """The ends of the cycles count, in any number; without cycles it is the best epoch."""
    model = train_module.build_model("plain", side=44)
    values = model.get_weights()
    (tmp_path / "best.weights.h5").touch()
    assert [file.name for file in train_module.ends_of(tmp_path)] == ["best.weights.h5"]
    for cycle in (1, 2):
        model.set_weights([value + cycle for value in values])
        model.save_weights(tmp_path / f"cycle{cycle}.weights.h5")
    train_module.load_weights(model, train_module.ends_of(tmp_path))
    for value, mean in zip(values, model.get_weights(), strict=True):
        assert mean == pytest.approx(value + 1.5, abs=1e-5)


@pytest.mark.parametrize("epochs, cycle, kept", [(39, 13, [13, 26, 39]), (7, 7, [5]), (1, 1, [5])])
def test_cycles_that_do_not_fit_are_none(train_module, epochs, cycle, kept):
    """A run of another length than the recipe's ends calmly too, as one cycle; and patience outlasts a cycle."""
    arguments = train_module.recipe_of("taught") | {"epochs": epochs, "patience": 20}
    assert train_module.cycle_of(arguments) == cycle
    assert train_module.patience_of(arguments) == (26 if cycle < epochs else 20)
    row = {name: str(value) for name, value in arguments.items()} | {"epochs_trained": str(epochs), "best_epoch": "5"}
    assert train_module.kept_epochs(row) == kept


def test_every_cycle_begins_anew(train_module, build_small_model):
    """With the learning rate at its peak, and with mixup and erasing until its calm end."""
    faces = np.zeros((8, 48, 48), np.uint8)
    options = {"mixup": 0.2, "erasing": 0.5, "calm": 2, "period": 3}
    batches = train_module.FaceBatches(faces, np.arange(8) % 7, 44, 4, seed=0, **options)
    strong = []
    for epoch in range(6):
        batches.start_epoch(epoch)
        strong.append((batches.mixup > 0, batches.erasing > 0))
    assert strong == [(True, True), (True, True), (False, False)] * 2
    model = build_small_model()
    train_module.compile_model(model, 10, 6, 3, 0.1, weight_decay=0.0, label_smoothing=0.0, ema=0.0)
    rates = []
    for step in (0, 15, 29, 30, 45):
        model.optimizer.iterations.assign(step)
        rates.append(float(model.optimizer.learning_rate))
    assert rates == pytest.approx([0.1, 0.05, 0.1 * (1 + np.cos(np.pi * 29 / 30)) / 2, 0.1, 0.05], rel=1e-4)


def test_blended_targets_stay_blended(train_module):
    """What the network before said of a face comes to the network as it was blended, each face with its own."""
    rng = np.random.default_rng(0)
    targets = rng.dirichlet(np.ones(7), 10).astype(np.float32)
    faces = np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 48, 48), np.uint8)
    batches = train_module.FaceBatches(faces, targets, 44, 10, seed=0, augmentation=False)
    batch, seen = batches[0]
    assert sorted(batch[:, 0, 0, 0]) == list(range(10))
    assert seen == pytest.approx(targets[batch[:, 0, 0, 0].astype(int)])


def test_early_stopping_counts_from_the_log(train_module, build_small_model):
    """Of three epochs without a better loss two were before the run was stopped: the next one is the last."""
    import keras

    model = build_small_model()
    model.compile(keras.optimizers.SGD(0.0), "categorical_crossentropy")
    faces, targets = np.zeros((4, 48, 48, 1)), np.eye(7)[:4]
    stop = train_module.EarlyStopping(past_losses=[0.1, 0.2, 0.3], patience=3)
    limits = {"initial_epoch": 3, "epochs": 6}
    history = model.fit(faces, targets, validation_data=(faces, targets), callbacks=[stop], verbose=0, **limits)
    assert history.epoch == [3]


def test_the_temperature_is_found_and_changes_no_prediction(train_module):
    """Labels are drawn from a softmax; one with logits three times as large should be divided by three."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (20_000, 7))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (true.cumsum(axis=1) > rng.random((len(true), 1))).argmax(axis=1)
    too_sure = true**3 / (true**3).sum(axis=1, keepdims=True)
    assert train_module.fit_temperature(too_sure, labels) == pytest.approx(3, rel=0.05)
    assert utils.calibration_error(true, labels) < 0.02 < 0.1 < utils.calibration_error(too_sure, labels)

    model = train_module.build_model("plain")
    faces = rng.integers(0, 256, (5, 48, 48, 1)).astype(np.float32)
    before = model.predict(faces, verbose=0)
    train_module.divide_logits(model, 3.0)
    expected = before ** (1 / 3) / (before ** (1 / 3)).sum(axis=1, keepdims=True)
    assert model.predict(faces, verbose=0) == pytest.approx(expected, abs=1e-5)


def test_a_face_is_looked_at_as_the_saved_model_does(train_module):
    """What training cuts out of a face is what the model crops by itself, and augmented faces are centred on it."""
    import keras

    keras.utils.set_random_seed(0)
    whole, part = train_module.build_model("plain"), train_module.build_model("plain", side=train_module.VIEW)
    part.set_weights(whole.get_weights())
    faces = np.random.default_rng(0).integers(0, 256, (3, 48, 48)).astype(np.uint8)
    seen = part.predict(train_module.look(faces), verbose=0)
    raw = faces[..., None].astype(np.float32)
    assert whole.predict(raw, verbose=0) == pytest.approx(seen, abs=1e-6)
    wide, all_of_it = train_module.build_model("plain", view=48), train_module.build_model("plain", side=48)
    for model in (wide, all_of_it):
        model.set_weights(whole.get_weights())
    assert wide.predict(raw, verbose=0) == pytest.approx(all_of_it.predict(raw, verbose=0), abs=1e-6)
    assert np.abs(wide.predict(raw, verbose=0) - seen).max() > 1e-4  # the edge counts
    bright_corner = np.zeros((48, 48), np.uint8)
    bright_corner[18:30, 18:30] = 255
    for side in (32, 44):
        rng = np.random.default_rng(1)
        mean = np.mean([train_module.augment(bright_corner, side, 0.0, rng) for _ in range(300)], axis=0)
        mean -= mean.min()
        centre = (
            (mean.sum(axis=0) * np.arange(side)).sum() / mean.sum(),
            (mean.sum(axis=1) * np.arange(side)).sum() / mean.sum(),
        )
        assert centre == pytest.approx([(side - 1) / 2] * 2, abs=0.4)


def test_making_a_batch_costs_less_than_learning_from_it():
    """Measured in the recorded runs, on the machine that trained: otherwise the network would wait for its faces."""
    final = pd.read_csv(utils.MODEL.parent / "iterations.csv").set_index("iteration").loc["final"]
    assert final["milliseconds_of_augmentation_a_step"] < final["milliseconds_a_step"] / 3


def test_a_run_is_not_continued_with_other_arguments(train):
    assert train("--epochs", 1, "--iteration", "plain").returncode == 0
    again = train("--epochs", 1, "--iteration", "plain", "--learning-rate", 0.01)
    assert_one_clear_line(again, "another learning_rate", "--run")


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--epochs", -1),
        ("--iteration", "best"),
        ("--batch-size", 0),
        ("--precision", "foo"),
        ("--learning-rate", "nan"),
        ("--limit", 2),
    ],
)
def test_arguments_that_make_no_sense_are_one_clear_line(train, tmp_path, flag, value):
    assert_one_clear_line(train(flag, value), "expected")
    assert not (tmp_path / "run").exists()


def test_without_data_it_says_how_to_get_it(train, tmp_path):
    assert_one_clear_line(train(data=tmp_path / "nothing"), "no train set", "make data")
    assert not (tmp_path / "model").exists()
