"""What 03 and 04 share: recipes, batches, a run that goes on, calibration and scores."""

import zlib
from dataclasses import replace

import keras
import numpy as np
import pytest

import training
import utils

RECIPE = training.Recipe(epochs=5, augmented=True, mixup=0.2, erasing=0.5, camera=0.5)


@pytest.fixture
def faces():
    """Twenty faces of noise, (20, 48, 48) uint8, and their labels."""
    return np.random.default_rng(0).integers(0, 256, (20, 48, 48)).astype(np.uint8), np.arange(20) % 7


def small_network(norm=True):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((None, None, 1))
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Conv2D(8, 5, strides=4, use_bias=False)(x)
    x = keras.layers.BatchNormalization()(x) if norm else x
    x = keras.layers.GlobalAveragePooling2D(keepdims=True)(keras.layers.ReLU()(x))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(7, 1, name="emotion")(keras.layers.Dropout(0.2)(x)))
    return keras.Model(inputs, keras.layers.Softmax()(x))


def test_a_recipe_sees_small_faces_first_and_is_calm_at_the_end():
    assert [RECIPE.side(epoch) for epoch in range(5)] == [32, 32, 32, 48, 48]
    assert [RECIPE.is_calm(epoch) for epoch in range(5)] == [False, False, False, False, True]
    assert replace(RECIPE, small_share=1.0).side(4) == 48  # the last epoch always sees whole faces
    assert replace(RECIPE, small_share=0.0).side(0) == 48


def test_batches_depend_on_seed_epoch_and_place_alone(faces):
    """In the last fifth there is no mixup: labels are one-hot."""
    first, second = (training.FaceBatches(*faces, RECIPE, 8, seed=1) for _ in range(2))
    assert len(first) == 2
    second.start_epoch(2)
    second[0]
    for epoch in (0, 4):
        first.start_epoch(epoch)
        second.start_epoch(epoch)
        for one, other in zip(first[1], second[1], strict=True):
            assert (one == other).all() and one.dtype == np.float32
    images, labels = first[0]
    assert images.shape == (8, 48, 48, 1) and 0 <= images.min() and images.max() <= 255
    assert set(np.unique(labels)) == {0, 1}
    first.start_epoch(0)
    images, labels = first[0]
    assert images.shape == (8, 32, 32, 1) and len(np.unique(labels)) > 2
    assert labels.sum(axis=1) == pytest.approx(np.ones(8), abs=1e-6)


def test_targets_move_towards_what_the_network_says_and_stay_with_their_faces():
    """Of the face and its mirror image: mirrored faces have the same targets. A resumed run has the same ones."""
    recipe = training.Recipe(epochs=200, small_share=0.0, adapted=0.25)
    assert [epoch + 1 for epoch in range(200) if recipe.adapts_after(epoch)] == list(range(120, 200, 8))
    assert not any(replace(recipe, adapted=0.0).adapts_after(epoch) for epoch in range(200))
    keras.utils.set_random_seed(0)
    network, labels = small_network(), np.arange(20) % 7
    images = np.random.default_rng(0).integers(0, 256, (20, 48, 48)).astype(np.uint8)
    images[:, 0, 0] = np.arange(20)  # by which a face is known again
    targets = []
    for shown in (images, images[:, :, ::-1]):
        batches = training.FaceBatches(shown, labels, recipe, 20, seed=0)
        batches.adapt(network, network.get_weights())
        targets.append(batches.labels)
    both = sum(network.predict(side[..., None] * 1.0, verbose=0) for side in (images, images[:, :, ::-1])) / 2
    assert targets[0] == pytest.approx(0.75 * np.eye(7)[labels] + 0.25 * both, abs=1e-5)
    assert targets[1] == pytest.approx(targets[0], abs=1e-5)
    faces, seen = batches[0]
    assert seen == pytest.approx(targets[1][faces[:, 0, -1, 0].astype(int)])


@pytest.mark.parametrize("side", [32, 48])
def test_augmented_faces_stay_in_the_middle(side):
    face = np.zeros((48, 48), np.uint8)
    face[18:30, 18:30] = 255
    mean = training.augment(np.stack([face] * 400), side, np.random.default_rng(1)).mean(axis=0)[..., 0]
    mean -= mean.min()
    for axis in (0, 1):
        assert (mean.sum(axis=axis) * np.arange(side)).sum() / mean.sum() == pytest.approx((side - 1) / 2, abs=0.4)


@pytest.mark.parametrize("side", [32, 48])
def test_a_face_is_changed_in_the_same_way_whichever_others_are_computed(faces, side):
    """So any number of processes shares a batch: to the bit, though OpenCV is given other faces with it."""
    images = np.tile(faces[0], (35, 1, 1))
    whole, some = (
        training.augment(images, side, np.random.default_rng(1), 0.5, 0.5, rows)
        for rows in (slice(None), np.array([3, 64, 511, 512, 699]))
    )
    assert (some == whole[[3, 64, 511, 512, 699]]).all() and len(whole) == 700


def test_a_poor_camera_loses_detail_and_keeps_the_light():
    """A board of fine squares loses most of its contrast in many of the pictures, and its mean in none."""
    board = (np.indices((48, 48)).sum(axis=0) % 2 * 200 + 20).astype(np.uint8)
    rng = np.random.default_rng(0)
    seen = np.stack([training.poor_camera(board, place % 4, rng) for place in range(100)])
    assert seen.shape == (100, 48, 48) and seen.dtype == np.uint8
    assert np.abs(seen.mean(axis=(1, 2)) - board.mean()).max() < 8
    assert 0.3 < (seen.std(axis=(1, 2)) < board.std() / 2).mean() < 0.95


def test_the_same_seed_trains_the_same_and_early_stopping_counts_from_the_log(faces, tmp_path):
    """Two runs have the same log. With a learning rate of 0 nothing gets better: patience ends them."""
    recipe = replace(RECIPE, epochs=6, small_share=0.3, learning_rate=0.0, average=0.9)
    logs = []
    for run in ("first", "second"):
        network = small_network(norm=False)
        training.start_run(tmp_path / run, {"seed": 3})
        training.train(tmp_path / run, network, recipe, faces, faces, 4, seed=3, patience=2)
        logs.append(training.read_log(tmp_path / run / "log.csv"))
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)
    assert len(logs[0]["epoch"]) == 5  # two small ones, which do not count, the best, and two without a better
    before = (tmp_path / "first" / "log.csv").read_bytes()
    training.train(tmp_path / "first", small_network(norm=False), recipe, faces, faces, 4, seed=3, patience=2)
    assert (tmp_path / "first" / "log.csv").read_bytes() == before  # it has ended, and does not go on

    with pytest.raises(utils.InputError, match="another seed"):
        training.start_run(tmp_path / "first", {"seed": 4})
    training.start_run(tmp_path / "third", training.fingerprint(faces))
    training.start_run(tmp_path / "third", training.fingerprint(faces))
    training.start_run(tmp_path / "first", {"seed": 3} | training.fingerprint(faces))  # it did not keep which before
    with pytest.raises(utils.InputError, match="another data"):  # the same faces in another order
        training.start_run(tmp_path / "third", training.fingerprint([part[::-1] for part in faces]))
    others = np.ones((2, 2, 2), np.uint8), np.array([3, 5], np.int32)
    assert training.fingerprint(others) == training.fingerprint((others[0], others[1].astype(np.int64)))
    assert training.fingerprint(others) == {"data": f"{zlib.crc32(bytes([1] * 8 + [3] + [0] * 7 + [5] + [0] * 7)):08x}"}


def test_a_run_that_goes_on_counts_its_patience_from_before_it_was_stopped(faces, tmp_path, monkeypatch):
    """Nothing gets better with a learning rate of 0: the best epoch, after which it is stopped, and two more."""
    recipe = replace(RECIPE, epochs=6, small_share=0.0, learning_rate=0.0)
    save = training.State.save

    def save_and_stop(state, *arguments):
        save(state, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.State, "save", save_and_stop)
        training.train(tmp_path, small_network(norm=False), recipe, faces, faces, 4, seed=3, patience=2)
    assert training.read_log(tmp_path / "log.csv")["epoch"] == [1]
    training.train(tmp_path, small_network(norm=False), recipe, faces, faces, 4, seed=3, patience=2)
    assert training.read_log(tmp_path / "log.csv")["epoch"] == [1, 2, 3]


def test_a_run_that_has_lost_files_is_mended_or_refused(faces, tmp_path):
    """The state of the last epoch holds them; what a run was started with it does not."""
    recipe, log = replace(RECIPE, epochs=2), tmp_path / "results" / "log.csv"
    run, arguments = tmp_path / "run", {"seed": 3}

    def train():
        training.start_run(run, arguments)
        training.train(run, small_network(norm=False), recipe, faces, faces, 4, seed=3, patience=9)
        (run / "finished").write_text("tensorflow")

    train()
    assert training.has_ended(run) and training.is_unsaved(run, arguments, log)
    assert not training.is_unsaved(run, {"seed": 4}, log)
    before = (run / "log.csv").read_bytes()
    for name in ("log.csv", "weights.npz"):
        (run / name).unlink()
        assert not training.has_ended(run) and not training.is_unsaved(run, arguments, log)
        train()
        assert training.has_ended(run) and (run / "log.csv").read_bytes() == before
    assert training.recall_precision(run, "") == "float32"
    (run / "precision").write_text("rubbish")
    assert training.recall_precision(run, "") in training.PRECISIONS
    for content in (None, "null", "{"):
        (run / "arguments.json").unlink() if content is None else (run / "arguments.json").write_text(content)
        with pytest.raises(utils.InputError, match="arguments.json is broken or missing; delete"):
            training.start_run(run, arguments)


def test_the_best_weights_are_kept_and_not_the_last(faces, tmp_path):
    """A network that learns to tell dark faces from light ones gets worse where the labels are the other way round."""
    recipe = training.Recipe(epochs=6, small_share=0.0, learning_rate=0.2)
    labels = np.arange(20) % 2
    faces = np.where(labels[:, None, None], faces[0] // 4, 255 - faces[0] // 4), labels
    others = faces[0], 1 - labels
    training.train(tmp_path, small_network(norm=False), recipe, faces, others, 4, seed=0, patience=9)
    losses = training.read_log(tmp_path / "log.csv")["val_loss"]
    assert len(losses) == 6 and min(losses) < losses[-1] - 0.1
    network = small_network(norm=False)
    training.load_weights(network, tmp_path)
    assert training.scores(training.predict(network, others[0]), others[1])[1] == pytest.approx(min(losses), abs=2e-3)


def test_a_training_that_diverges_keeps_what_it_had(faces, tmp_path):
    """It goes on from there when it is started again."""
    recipe = training.Recipe(epochs=3, small_share=0.0)

    def train(learning_rate, patience=9):
        network = small_network(norm=False)
        training.train(
            tmp_path, network, replace(recipe, learning_rate=learning_rate), faces, faces, 4, seed=0, patience=patience
        )

    with pytest.raises(utils.InputError, match="diverged in epoch 1: .*--precision float32"):
        train(1e38)
    assert not (tmp_path / "log.csv").exists()
    train(0.0, patience=1)  # which ends after two epochs
    before = (tmp_path / "weights.npz").read_bytes(), (tmp_path / "log.csv").read_bytes()
    with pytest.raises(utils.InputError, match="diverged in epoch 3"):
        train(1e38)
    assert ((tmp_path / "weights.npz").read_bytes(), (tmp_path / "log.csv").read_bytes()) == before
    train(0.0)
    assert training.read_log(tmp_path / "log.csv")["epoch"] == [1, 2, 3]


def test_the_weights_that_are_kept_are_those_that_were_validated(faces, tmp_path):
    """They are the averaged ones of the best epoch with whole faces, and `finish` says what they are worth."""
    recipe = replace(RECIPE, epochs=3, average=0.9, learning_rate=0.2)
    training.start_run(tmp_path, {})
    training.train(tmp_path, small_network(), recipe, faces, faces, 4, seed=0, patience=9)
    log, network = training.read_log(tmp_path / "log.csv"), small_network()
    training.load_weights(network, tmp_path)
    said = training.predict(network, faces[0])
    assert training.scores(said, faces[1])[1] == pytest.approx(log["val_loss"][-1], abs=2e-3)
    figures = training.finish(network, tmp_path, recipe, faces, faces)
    assert figures["best_epoch"] == figures["epochs_trained"] == 3
    calibrated = training.predict(network, faces[0])
    assert (figures["validation_accuracy"], figures["validation_cross_entropy"]) == training.scores(
        calibrated, faces[1]
    )


def test_batch_norms_get_the_statistics_of_faces_as_they_are(faces):
    """After that a network says of these faces what it says of them in training, and no weight has changed."""
    network, plain = small_network(), training.plain_faces(faces[0])
    norm = next(layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization))
    before = [weight.numpy() for weight in network.trainable_weights]
    training.reset_norms(network, plain, batch_size=7)  # the last batch is smaller
    assert all((old == new.numpy()).all() for old, new in zip(before, network.trainable_weights, strict=True))
    inputs = keras.Model(network.input, norm.input).predict(plain, verbose=0)
    assert norm.moving_mean.numpy() == pytest.approx(inputs.mean(axis=(0, 1, 2)), abs=1e-4)
    assert norm.momentum == keras.layers.BatchNormalization().momentum


def test_the_temperature_is_found():
    """Labels are drawn from a softmax; one with logits three times as large should be divided by three."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (20_000, 7))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (true.cumsum(axis=1) > rng.random((len(true), 1))).argmax(axis=1)
    too_sure = true**3 / (true**3).sum(axis=1, keepdims=True)
    assert training.fit_temperature(too_sure, labels) == pytest.approx(3, rel=0.05)
    assert utils.calibration_error(true, labels) < 0.02 < 0.1 < utils.calibration_error(too_sure, labels)
