# Generated from notebooks/08_adversarial_hack.ipynb by `make scripts`: edit the notebook, not this file.
"""Changes a happy face as little as possible until the CNN says Sad."""

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

import functools

import cv2
import numpy as np

import utils


@functools.cache
def compiled_gradient(network, target):
    """Return what `loss_gradient` does with one batch, as a graph: without one, most of the time goes into Python."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((None, utils.SIDE, utils.SIDE, 1), tf.float32)])
    def gradient_of(pixels):
        with tf.GradientTape() as tape:
            tape.watch(pixels)
            said = network(pixels, training=False)
            loss = -tf.reduce_sum(tf.math.log(tf.maximum(said[:, target], 1e-30)))
        return tape.gradient(loss, pixels)[..., 0], said

    return gradient_of


def loss_gradient(network, faces, target):
    """Return what each pixel does to the loss of the target, and the probabilities.

    Args:
        network: keras.Model, from (n, 48, 48, 1) to (n, 7) probabilities.
        faces: (n, 48, 48), 0 to 255.
        target: int, the wanted emotion's place in utils.EMOTIONS.

    Returns:
        Two float32 arrays: (n, 48, 48), the gradient of -log(probability of the target), and (n, 7).
    """
    batches = [faces[first : first + 64, ..., None].astype(np.float32) for first in range(0, len(faces), 64)]
    gradients, probabilities = zip(*(compiled_gradient(network, target)(batch) for batch in batches), strict=True)
    return np.concatenate(gradients), np.concatenate(probabilities)


def fgsm(network, faces, target, epsilon):
    """Change (n, 48, 48) uint8 faces by one step of `epsilon` grey values; see `loss_gradient`."""
    gradient, _ = loss_gradient(network, faces, target)
    return np.clip(faces - epsilon * np.sign(gradient), 0, 255).astype(np.uint8)


def pgd(network, faces, target, epsilon, steps=15):
    """Change (n, 48, 48) uint8 faces in `steps` steps, by `epsilon` grey values at most; see `loss_gradient`."""
    faces = faces.astype(np.int16)
    low, high = np.maximum(faces - epsilon, 0), np.minimum(faces + epsilon, 255)
    current, best, most = faces, faces, np.full(len(faces), -1.0)
    for step in range(steps + 1):
        gradient, probabilities = loss_gradient(network, current, target)
        better = probabilities[:, target] > most
        best = np.where(better[:, None, None], current, best)
        most = np.maximum(most, probabilities[:, target])
        # Half of the way in strides, the rest in single grey values.
        stride = max(1, epsilon // 4) if step < steps // 2 else 1
        current = np.clip(current - stride * np.sign(gradient).astype(np.int16), low, high)
    return best.astype(np.uint8)


def spare(network, face, hacked, target, least):
    """Take back as many changes of a (48, 48) uint8 face as the network's probability of the target, `least`, allows.

    Those of the pixels that matter least go first: where the gradient is smallest. Their number is found by bisection.
    """
    weight = np.abs(loss_gradient(network, hacked[None], target)[0][0])
    order = np.argsort(np.where(hacked != face, weight, np.inf), axis=None)
    low, high, best = 0, int((hacked != face).sum()), hacked
    while low < high:
        middle = (low + high + 1) // 2
        spared = hacked.copy()
        spared.flat[order[:middle]] = face.flat[order[:middle]]
        if loss_gradient(network, spared[None], target)[1][0, target] > least:
            low, best = middle, spared
        else:
            high = middle - 1
    return best


SURE = 0.91  # more than 90 %, and a little for the rounding of other programs
HAPPY = utils.EMOTIONS.index("Happy")


def read_face(path):
    """Read the largest face of a picture, or a picture of 48x48 as it is: (48, 48) uint8 grey."""
    picture = utils.read_picture(path)
    if picture.shape[:2] == (utils.SIDE, utils.SIDE):
        return cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    faces = utils.FaceDetector().detect(picture)
    if not faces:
        raise utils.InputError(f"no face in {path}; expected a picture with one, or a face of 48x48 pixels")
    return utils.crop_face(picture, faces[0])  # the largest


def happy_faces(data, limit):
    """Return up to `limit` test faces that are labelled Happy, plain smiles first, (n, 48, 48) uint8.

    Plain is what correlates with the mean of all of them. The half with less contrast comes last, because a small
    change is a large one there. Where FER2013 is missing, it is the smile of Eileen Collins (NASA, in the public
    domain), which scikit-image has.
    """
    if not data and not utils.find_fer2013("test", utils.DATA):
        import skimage.data

        print("the test set is missing (`make data` downloads it): an astronaut's face takes its place")
        astronaut = skimage.data.astronaut()[..., ::-1]
        return utils.crop_face(astronaut, utils.FaceDetector().detect(astronaut)[0])[None]
    images, labels = utils.load_fer2013("test", data or None)
    smiles = images[labels == HAPPY]
    if not len(smiles):
        raise utils.InputError(f"no test face in {data or utils.DATA} is labelled Happy; give an image")
    pixels = smiles.reshape(len(smiles), -1).astype(np.float32)
    pixels -= pixels.mean(axis=1, keepdims=True)
    contrast = np.linalg.norm(pixels, axis=1)
    likeness = pixels @ pixels.mean(axis=0) / np.maximum(contrast, 1e-9)
    likeness[contrast < np.median(contrast)] = -np.inf
    return smiles[np.argsort(-likeness, kind="stable")[:limit]]


def parse_args(argv=None):
    """Parse the command line, `sys.argv[1:]` unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--image",
        type=str,
        default="",
        help="a picture of a happy face; empty for one of the test faces, or an astronaut's without them",
    )
    parser.add_argument(
        "--target", type=str, default="Sad", help="the emotion that the CNN shall see (default: %(default)s)"
    )
    parser.add_argument(
        "--epsilon",
        type=int,
        default=8,
        help="grey values, of 255, by which a pixel may change at most (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=48,
        help="happy test faces that the CNN is asked about, plainest smiles first (default: %(default)s)",
    )
    parser.add_argument(
        "--model", type=str, default="", help="a pickled Keras model; empty for results/model/my_own_model.pkl"
    )
    parser.add_argument("--data", type=str, default="", help="folder with FER2013; empty for data")
    parser.add_argument(
        "--output",
        type=str,
        default="",
        help="folder for both images; empty for results/hack_cnn, or runs/hack_cnn if it is not the default hack",
    )
    return parser.parse_args(argv)


def main(image: str, target: str, epsilon: int, limit: int, model: str, data: str, output: str):
    if target not in utils.EMOTIONS or target == "Happy":
        raise utils.InputError(
            f"target is {target!r}; expected one of {', '.join(e for e in utils.EMOTIONS if e != 'Happy')}"
        )
    if not 1 <= epsilon <= 255:
        raise utils.InputError(f"epsilon is {epsilon}; expected 1 to 255 grey values")
    if limit < 1:
        raise utils.InputError(f"limit is {limit}; expected 1 or more faces")
    is_default = (image, target, limit, model, data, output) == ("", "Sad", 48, "", "", "")
    ours = is_default and bool(utils.find_fer2013("test", utils.DATA))
    folder = utils.output_folder(output, (utils.RESULTS if ours else utils.RUNS) / "hack_cnn")
    for name in ("input_image", "hacked_image"):
        utils.check_output(folder / f"{name}.png", ".png", [image, model])
    wanted = utils.EMOTIONS.index(target)
    backend = utils.import_keras().backend.backend()
    if backend != "tensorflow":
        raise utils.InputError(
            f"Keras' backend is {backend}, and the gradient needs TensorFlow: set KERAS_BACKEND=tensorflow"
        )
    network = utils.load_model(model or None)
    candidates = read_face(image)[None] if image else happy_faces(data, limit)
    said = network.predict(candidates[..., None].astype(np.float32), verbose=0)
    happy = said.argmax(axis=1) == HAPPY
    if not happy.any():
        name, sure = utils.EMOTIONS[said[0].argmax()], said[0].max()
        raise utils.InputError(
            f"the face is {name} to the CNN ({sure:.0%}); expected one that it calls Happy: give another image"
        )
    candidates, sure = candidates[happy], said[happy, HAPPY]
    surest = candidates[sure >= np.quantile(sure, 0.75)]

    limits = [most for most in range(1, epsilon) if most <= 8 or most & (most - 1) == 0]
    for most in [*limits, epsilon]:
        hacked = pgd(network, surest, wanted, most)
        after = network.predict(hacked[..., None].astype(np.float32), verbose=0)[:, wanted]
        print(f"changes of up to {most} of 255: {target} with up to {after.max():.0%}")
        if after.max() > SURE:
            break
    else:
        raise utils.InputError(
            f"with changes of up to {epsilon} grey values the CNN says {target} with {after.max():.0%} at most; "
            f"expected {SURE:.0%}: allow more with epsilon"
        )
    chosen = int(np.argmax(after > SURE))  # plain smiles come first
    face = surest[chosen]
    changed = (hacked[chosen] != face).sum()
    hacked = spare(network, face, hacked[chosen], wanted, SURE)
    print(f"{changed - (hacked != face).sum()} of {changed} changed pixels are taken back: {SURE:.0%} is sure enough")

    with utils.locked(folder):
        with (
            utils.replacing(folder / "input_image.png") as first,
            utils.replacing(folder / "hacked_image.png") as second,
        ):
            for path, picture in ((first, face), (second, hacked)):
                path.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
    files = [np.fromfile(folder / f"{name}.png", np.uint8) for name in ("input_image", "hacked_image")]
    pair = np.stack([cv2.imdecode(file, cv2.IMREAD_UNCHANGED) for file in files])
    before, after = network.predict(pair[..., None].astype(np.float32), verbose=0)
    change = np.abs(pair[1].astype(int) - pair[0])
    print(f"input_image.png:  {utils.EMOTIONS[before.argmax()]}, {before.max():.0%}")
    print(f"hacked_image.png: {utils.EMOTIONS[after.argmax()]}, {after.max():.0%}")
    print(f"no pixel changed by more than {change.max()} of 255, on average by {change.mean():.2f}")
    print(f"both are in {utils.show_path(folder)}")


if __name__ == "__main__":
    utils.run_script(main, parse_args)
