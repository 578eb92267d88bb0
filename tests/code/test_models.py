"""Models are saved whole, load only what they should, and mean the same in Keras and in OpenCV."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest

import utils


@pytest.fixture(scope="module")
def saved(build_small_model, tmp_path_factory):
    """A small model and the path of its pickle."""
    path = tmp_path_factory.mktemp("model") / "small.pkl"
    model = build_small_model()
    utils.save_model(model, path)
    return model, path


def test_keras_and_opencv_give_the_same_probabilities(saved):
    model, path = saved
    faces = np.random.default_rng(0).integers(0, 256, (8, 48, 48)).astype(np.uint8)
    expected = model.predict(faces[..., None].astype(np.float32), verbose=0)
    loaded = utils.load_model(path).predict(faces[..., None].astype(np.float32), verbose=0)
    assert loaded == pytest.approx(expected, abs=1e-6)
    assert utils.EmotionNet(path.with_suffix(".tflite")).predict(faces) == pytest.approx(expected, abs=1e-5)


def test_plain_pickle_loads_the_model_too(saved):
    """It is a pickle of Keras' own layers, so that it loads wherever Keras is."""
    model, path = saved
    assert pickle.loads(path.read_bytes()).count_params() == model.count_params()


class CallsSystem:
    def __reduce__(self):
        return os.system, ("echo owned > owned.txt",)


class CallsAnotherMethodOfKeras:
    def __reduce__(self):
        import keras

        return getattr, (keras.Model, "from_config")


def test_a_pickle_that_calls_something_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for crafted in (CallsSystem(), CallsAnotherMethodOfKeras(), {"model": CallsSystem()}):
        path = tmp_path / "crafted.pkl"
        path.write_bytes(pickle.dumps(crafted))
        with pytest.raises(utils.InputError, match="crafted.pkl.*which no Keras model needs"):
            utils.load_model(path)
    assert not (tmp_path / "owned.txt").exists()


def test_a_model_that_carries_python_code_is_refused(tmp_path):
    import keras

    inputs = keras.Input((48, 48, 1))
    outputs = keras.layers.Lambda(lambda x: x[:, :7, 0, 0], output_shape=(7,))(inputs)
    path = tmp_path / "lambda.pkl"
    path.write_bytes(pickle.dumps(keras.Model(inputs, outputs)))
    with pytest.raises(utils.InputError, match="lambda.pkl"):
        utils.load_model(path)


def test_broken_pickles_are_named(saved, tmp_path):
    _, good = saved
    contents = {
        "truncated": good.read_bytes()[:3000],
        "empty": b"",
        "text": b"hello",
        "number": pickle.dumps(5),
        "bytes": pickle.dumps(io.BytesIO(b"x")),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(content)
        with pytest.raises(utils.InputError, match=f"{name}.pkl"):
            utils.load_model(path)
    with pytest.raises(utils.InputError, match="no model at .*none.pkl"):
        utils.load_model(tmp_path / "none.pkl")


def test_models_for_other_inputs_or_outputs_are_named(build_small_model, tmp_path):
    for name, options in {"side": {"side": 32}, "five": {"emotions": 5}}.items():
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(pickle.dumps(build_small_model(**options)))
        with pytest.raises(utils.InputError, match=f"{name}.pkl maps .* expected"):
            utils.load_model(path)


def test_a_save_that_fails_leaves_the_old_model(build_small_model, tmp_path, monkeypatch):
    path = tmp_path / "model.pkl"
    path.write_bytes(b"old")
    model = build_small_model()
    monkeypatch.setattr(type(model), "export", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        utils.save_model(model, path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_model_that_opencv_misreads_is_not_saved(build_small_model, tmp_path):
    model = build_small_model()
    model.layers[-1].bias.assign(np.arange(7.0))  # OpenCV 4.14 drops the bias of a dense layer
    with pytest.raises(RuntimeError, match="OpenCV's probabilities differ"):
        utils.save_model(model, tmp_path / "model.pkl")
    assert not list(tmp_path.iterdir())


def test_the_pickle_holds_an_ordinary_keras_archive(saved):
    """The archive inside is what keras.saving writes, with nothing beside config, metadata and weights."""
    archive = saved[1].read_bytes()
    start = archive.index(b"PK\x03\x04")
    with zipfile.ZipFile(io.BytesIO(archive[start:])) as members:
        assert set(members.namelist()) == {"metadata.json", "config.json", "model.weights.h5"}


def test_grad_cam_is_bright_where_the_emotion_comes_from():
    """One feature, brightness, speaks for Happy: so does the bright corner of a face, and for Sad nothing."""
    import keras

    inputs = keras.Input((48, 48, 1))
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Conv2D(1, 4, strides=4, kernel_initializer="ones")(x)
    x = keras.layers.GlobalAveragePooling2D(keepdims=True)(x)
    emotion = keras.layers.Conv2D(7, 1, name="emotion", kernel_initializer="zeros")
    x = keras.layers.GlobalAveragePooling2D()(emotion(x))
    model = keras.Model(inputs, keras.layers.Softmax()(x))
    happy, sad = utils.EMOTIONS.index("Happy"), utils.EMOTIONS.index("Sad")
    weights = np.zeros((1, 1, 1, 7), np.float32)
    weights[..., happy] = 1
    emotion.set_weights([weights, np.zeros(7, np.float32)])
    face = np.zeros((48, 48), np.uint8)
    face[8:16, 28:36] = 255
    maps = utils.grad_cam(model, np.stack([face, face]), np.array([happy, sad]))
    assert maps.shape == (2, 48, 48) and maps.min() >= 0 and maps.max() <= 1
    assert maps[0, 12, 32] > 0.9 and maps[0, 36:].max() < 0.05
    assert maps[1].max() == 0
    assert utils.grad_cam(model, np.empty((0, 48, 48), np.uint8), np.empty(0, int)).shape == (0, 48, 48)
