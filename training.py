"""What 03 and 04 share: a recipe, batches of faces, a run that can be stopped and goes on, calibration and scores.

Keras is imported at the top, which takes seconds: what runs without Keras is in utils.py.
"""

import atexit
import csv
import functools
import importlib.util
import json
import os
import re
import shutil
import socket
import sys
import textwrap
import time
import zipfile
import zlib
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass

import cv2
import numpy as np

import utils

keras = utils.import_keras()
layers = keras.layers

# -------------------------------------------------------------------------------------------------------- recipe


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. A setting is here because two rows of a table differ in it.

    architecture: the name of a network in the notebook that trains it.
    epochs: passes over the training faces.
    small_share: share of the epochs, from the first on, that see faces of 32x32 pixels, at half the price on a
        processor.
    augmented: whether the faces are turned, shifted, scaled, mirrored, and changed in brightness and contrast.
    mixup: the alpha of mixup (Zhang et al. 2018, arXiv:1710.09412); 0 for none.
    erasing: probability that a rectangle is painted over (Zhong et al. 2020, arXiv:1708.04896).
    camera: probability that a face is seen through a poor camera, see `poor_camera`.
    smoothing: of the labels (Szegedy et al. 2016, arXiv:1512.00567), 0 to 1.
    average: momentum of the moving average of the weights; 0 for none.
    adapted: share of each target that is replaced, several times, by what the averaged weights say of the face; 0 for
        none (self-adaptive training, Huang et al. 2020, arXiv:2002.10319).
    optimizer: sgd (Nesterov, momentum 0.9) or adamw.
    learning_rate: its peak; it rises for two epochs and falls to 0 along a cosine.
    weight_decay: decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101), of kernels only.
    """

    architecture: str = "plain"
    epochs: int = 20
    small_share: float = 0.6
    augmented: bool = False
    mixup: float = 0.0
    erasing: float = 0.0
    camera: float = 0.0
    smoothing: float = 0.0
    average: float = 0.0
    adapted: float = 0.0
    optimizer: str = "sgd"
    learning_rate: float = 0.06
    weight_decay: float = 0.005

    @property
    def small_epochs(self):
        """The number of epochs with small faces; the last epoch always sees whole ones."""
        return min(round(self.epochs * self.small_share), self.epochs - 1)

    def side(self, epoch):
        """Pixels of the faces that an epoch sees, both sides."""
        return SMALL_SIDE if epoch < self.small_epochs else utils.SIDE

    def is_calm(self, epoch):
        """Whether an epoch is in the last fifth, without mixup and erasing (He et al. 2019, arXiv:1909.09148)."""
        return epoch >= round(0.8 * self.epochs)

    def adapts_after(self, epoch):
        """Whether the targets are adapted after an epoch: ten times, in the last two fifths of a long run."""
        start, every = round(0.6 * self.epochs), max(1, round(0.04 * self.epochs))
        since = epoch + 1 - start
        return self.adapted > 0 and since >= 0 and since % every == 0 and epoch + 1 < self.epochs


SMALL_SIDE = 32
PRECISIONS = "float32", "mixed_bfloat16"


def check_arguments(epochs, batch_size, patience, limit, seed, precision):
    """Refuse arguments of a training that make no sense.

    Raises:
        InputError: one of them is out of its range.
    """
    if epochs < 0 or limit < 0 or batch_size < 1 or patience < 1 or not 0 <= seed < 2**32:
        raise utils.InputError(
            f"epochs is {epochs}, limit {limit}, batch_size {batch_size}, patience {patience}, seed {seed}; "
            "expected batch_size and patience of 1 or more, the others of 0 or more, and a seed below 2**32"
        )
    if precision not in ("", *PRECISIONS):
        raise utils.InputError(f"precision is {precision!r}; expected float32 or mixed_bfloat16")


def load_parts(data, limit, seed, fraction=0.1):
    """Return the faces to train on and those to validate on, each a pair of (n, 48, 48) uint8 images and (n,) labels.

    Args:
        data: folder with the training rows; the project's own if empty.
        limit: number of rows that are used; 0 for all.
        seed: of the split.
        fraction: share of the rows that is held out.

    Raises:
        InputError: there are no training rows, or too few to hold some out.
    """
    images, labels = utils.load_fer2013("train", data or None)
    if limit:
        images, labels = images[:limit], labels[:limit]
    parts = utils.split_validation(images, labels, fraction, seed)
    if not all(len(part) for part in parts):
        raise utils.InputError(
            f"{len(images)} images are too few to hold out {fraction:.0%}; expected a hundred or more"
        )
    print(f"{len(parts[0])} images to train on, {len(parts[1])} to validate on")
    return [(images[part], labels[part]) for part in parts]


# ------------------------------------------------------------------------------------------------------- devices

CLUSTER = tuple(f"KERAS_DISTRIBUTION_{name}" for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID"))
WAIT = 60  # seconds that a process waits for the first one, and the first one for the others


def is_first():
    """Whether this process is the one that prints and writes; one that is alone is."""
    distribution = keras.distribution.distribution()
    return distribution is None or distribution.data_shard_id == 0


def own_rows(count):
    """Return the slice of the rows of a batch that this process gives its devices; all if it is alone."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return slice(0, count)
    share = count // distribution.num_processes
    return slice(share * distribution.data_shard_id, share * (distribution.data_shard_id + 1))


def device_count():
    """Return the number of devices that share a batch, in all processes."""
    distribution = keras.distribution.distribution()
    return distribution.num_model_replicas if distribution else 1


def agree(text):
    """Wait for all processes of this training, and go on if they give the same text.

    Raises:
        InputError: they do not.
    """
    distribution = keras.distribution.distribution()
    if distribution and distribution.num_processes > 1:
        from jax.experimental import multihost_utils

        hashes = multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))
        if len(np.unique(hashes)) > 1:
            raise utils.InputError(
                "the processes of this training differ in their arguments or in what --run holds: give all the same "
                "arguments, and a --run that all of them see"
            )


@contextmanager
def together():
    """End this process at once where a training of several fails: JAX's exit would wait a minute for the others.

    Raises:
        InputError: a device failed, or another process has ended.
    """
    try:
        yield
    except BaseException as error:
        distribution = keras.distribution.distribution()
        if distribution is None or distribution.num_processes == 1:
            raise
        atexit.register(_exit_at_once, 130 if isinstance(error, KeyboardInterrupt) else 1)
        if not re.match("[A-Z_]+: ", str(error)):  # as the errors of JAX's devices begin, some of them a ValueError
            raise
        raise utils.InputError(
            f"this training cannot go on ({utils.shorten(error)}): a device failed, or another process has ended; "
            "start all processes again, and they go on from the last epoch"
        ) from None


def _exit_at_once(code):
    sys.stdout.flush()
    if is_first():
        time.sleep(3)  # so that the others can say what they ended for: JAX aborts them when this one is gone
    os._exit(code)


@together()
def distribute(batch_size):
    """Let all devices share every batch, by Keras' distribution on JAX: called before a model is built.

    Keras' variables, KERAS_DISTRIBUTION_JOB_ADDRESSES and so on, join the devices of several processes; then only the
    first process prints and writes. With one device, and with another backend than JAX, nothing is changed.

    Raises:
        InputError: a variable is wrong, the first process is not there, or the devices cannot share batches evenly.
    """
    is_joined = any(name in os.environ for name in CLUSTER)
    if keras.backend.backend() != "jax":
        if is_joined:
            raise utils.InputError(
                f"KERAS_DISTRIBUTION_* are set, and Keras' backend is {keras.backend.backend()}: only JAX trains in "
                "several processes here; set KERAS_BACKEND=jax, or unset them"
            )
        return
    import jax

    if is_joined:
        _join_processes(jax)
    devices, processes = jax.device_count(), jax.process_count()
    if devices == 1:
        return
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    if jax.local_device_count() * processes != devices:
        raise utils.InputError(f"{devices} devices in {processes} processes: expected as many in each")
    if batch_size % devices:
        raise utils.InputError(
            f"batch_size is {batch_size}, and {devices} devices share each batch: expected a multiple of {devices}"
        )
    if not is_first():
        sys.stdout = open(os.devnull, "w")
    print(f"{devices} devices in {processes} process{'es' * (processes > 1)} share each batch")


def _meet(host, port, count, place):
    """Return when all processes are there: JAX aborts with a page of text where one of them is missing.

    Raises:
        InputError: the first one, or some of the others, did not come within WAIT seconds.
        OSError: the host is not known, or the port is taken.
    """
    socket.getaddrinfo(host, port)
    end, greeting = time.monotonic() + WAIT, b"process of a training of %d" % count
    if place == 0:
        with ExitStack() as stack:
            server = stack.enter_context(socket.create_server(("", port), backlog=count))
            others = []
            while len(others) < count - 1:
                try:
                    server.settimeout(max(0.1, end - time.monotonic()))
                    other = stack.enter_context(server.accept()[0])
                    other.settimeout(5)
                    others += [other] if other.recv(100) == greeting else []
                except (TimeoutError, ConnectionError):
                    if time.monotonic() > end:
                        raise utils.InputError(
                            f"{1 + len(others)} of {count} processes joined within {WAIT} s: start the others too"
                        ) from None
            for other in others:
                other.sendall(b"go")
        return
    error = "it is no process of this training"
    while time.monotonic() < end:
        try:
            with socket.create_connection((host, port), 5) as first:
                first.sendall(greeting)
                first.settimeout(WAIT)
                if first.recv(100) == b"go":
                    return
        except OSError as failed:
            error = failed
        time.sleep(0.5)
    raise utils.InputError(
        f"the first process of this training, at {host}:{port}, did not answer for {WAIT} s ({error}): start it too, "
        f"or correct {CLUSTER[0]}"
    )


def _join_processes(jax):
    """Do what keras.distribution.initialize does, with its variables, and say what is wrong with them.

    JAX is called, and not Keras, for its timeouts: of a process that dies JAX's own would learn after 100 s.
    """
    addresses, count, place = (os.environ.get(name, "") for name in CLUSTER)
    host, _, port = addresses.split(",")[0].rpartition(":")
    numbers = all(text.isdecimal() for text in (count, place, port))
    if not (host and numbers and int(place) < int(count) and 0 < int(port) < 2**16):
        raise utils.InputError(
            f"{', '.join(CLUSTER)} are {addresses!r}, {count!r}, {place!r}; expected the first process's host:port, "
            "the number of processes, and the place of this one, from 0"
        )
    print(f"waiting up to {WAIT} s for {count} processes to join", flush=True)
    try:
        _meet(host, int(port), int(count), int(place))
    except OSError as error:
        raise utils.InputError(f"{CLUSTER[0]}: {host}:{port} cannot be used ({error}): give another address") from None
    jax.distributed.initialize(
        f"{host}:{port}", int(count), int(place), initialization_timeout=WAIT, heartbeat_timeout_seconds=30
    )


# ------------------------------------------------------------------------------------------------------- batches


def plain_faces(images, side=utils.SIDE):
    """Return (n, 48, 48) uint8 faces as a network takes them: (n, side, side, 1) float32, 0 to 255."""
    if side != images.shape[1]:
        images = np.stack([cv2.resize(face, (side, side), interpolation=cv2.INTER_AREA) for face in images])
    return images[..., None].astype(np.float32)


def poor_camera(face, kind, rng):
    """Return a (48, 48) uint8 face as a poor camera shows it: from afar, out of focus, compressed, or in the dark.

    Args:
        face: (48, 48) uint8.
        kind: 0, seen through 14 to 35 pixels; 1, blurred by a sigma of 0.5 to 1.5 pixels; 2, compressed to a JPEG
            quality of 15 to 60; 3, with noise of up to 12 grey values.
        rng: numpy Generator.
    """
    if kind == 0:
        side = int(rng.integers(14, 36))
        face = cv2.resize(face, (side, side), interpolation=cv2.INTER_AREA)
        return cv2.resize(face, (utils.SIDE, utils.SIDE), interpolation=cv2.INTER_LINEAR)
    if kind == 1:
        return cv2.GaussianBlur(face, (0, 0), rng.uniform(0.5, 1.5))
    if kind == 2:
        return utils.compress_face(face, int(rng.integers(15, 61)))
    return np.clip(face + rng.normal(0, rng.uniform(0, 12), face.shape), 0, 255).astype(np.uint8)


def warp(images, inverse, side):
    """Return affine views of faces, cubic and mirrored at the border: one call, during which other threads can work.

    Args:
        images: (n, 48, 48) uint8, of which OpenCV takes 600 at once.
        inverse: (n, 2, 3) float, from (x, y, 1) in the view to (x, y) in the face.
        side: of the views, in pixels.

    Returns:
        (n, side, side) uint8.
    """
    margin = 2  # what a cubic needs beyond the border
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin)), "symmetric")
    x, y = np.meshgrid(*[np.arange(side, dtype=np.float32)] * 2)
    places = inverse.astype(np.float32) @ np.stack([x.ravel(), y.ravel(), np.ones(side * side, np.float32)])
    last = utils.SIDE - 0.5  # a pixel covers half a unit on both sides of its centre
    places += 0.5
    np.abs(places, out=places)
    np.minimum(places, 2 * last - places, out=places)
    np.maximum(places, 0, out=places)
    coarse = 1.5 * 2**18  # beside it float32 keeps steps of 1/32, as OpenCV does: so a view depends on its face alone
    places += margin - 0.5 + coarse
    places -= coarse
    places[:, 1] += np.arange(len(images), dtype=np.float32)[:, None] * padded.shape[1]
    maps = np.ascontiguousarray(places.transpose(1, 0, 2)).reshape(2, -1, side)
    views = cv2.remap(padded.reshape(-1, padded.shape[2]), *maps, cv2.INTER_CUBIC)
    return views.reshape(-1, side, side)


def augment(images, side, rng, erasing=0.0, camera=0.0, rows=slice(None)):
    """Return randomly changed copies of faces.

    Args:
        images: (n, 48, 48) uint8.
        side: of the result, in pixels.
        rng: numpy Generator.
        erasing, camera: see Recipe.
        rows: of the result that are computed, as slice or ints; they are the same whichever others are.

    Returns:
        (n, side, side, 1) float32, 0 to 255, or fewer rows.
    """

    def draw(low, high, *shape):
        return rng.uniform(low, high, (len(images), *shape))[rows]  # for all faces, so that the others do not matter

    kinds, seeds = rng.choice(4, len(images), p=(0.4, 0.2, 0.2, 0.2))[rows], rng.integers(2**63, size=len(images))[rows]
    original, seen = images[rows], images[rows].copy()
    for place in np.flatnonzero(draw(0, 1) < camera):
        seen[place] = poor_camera(original[place], kinds[place], np.random.default_rng(seeds[place]))

    # From a pixel of the result to the place in the face that it shows.
    zoom = utils.SIDE / side
    angle, scale = draw(-np.pi / 12, np.pi / 12), zoom / draw(0.85, 1.2)
    cosine, sine, mirror = np.cos(angle) * scale, np.sin(angle) * scale, np.sign(draw(-1, 1))
    turn = np.stack([np.stack([cosine * mirror, -sine * mirror], 1), np.stack([sine, cosine], 1)], 1)
    shift = draw(-4, 4, 2, 1) / zoom + (side - 1) / 2
    inverse = np.concatenate([turn, (utils.SIDE - 1) / 2 - turn @ shift], 2)
    parts = range(0, len(seen), 512)
    faces = np.concatenate([warp(seen[part : part + 512], inverse[part : part + 512], side) for part in parts])

    mean = faces.mean(axis=(1, 2), keepdims=True, dtype=np.float32)
    light = rng.normal(0, 15, (len(images), 1, 1)).astype(np.float32)[rows]
    faces = (faces - mean) * draw(0.75, 1.3, 1, 1).astype(np.float32)
    faces += mean + light
    np.clip(faces, 0, 255, out=faces)
    area, ratio = draw(0.02, 0.2) * side**2, np.exp(draw(-1, 1))
    size = np.minimum(np.sqrt([area * ratio, area / ratio]), side - 1).astype(int)
    first = (draw(0, 1, 2).T * (side - size)).astype(int)
    (top, left), (bottom, right), grey = first, first + size, draw(0, 255)
    for place in np.flatnonzero(draw(0, 1) < erasing):
        faces[place, top[place] : bottom[place], left[place] : right[place]] = grey[place]
    return faces[..., None]


class FaceBatches(keras.utils.PyDataset):
    """Batches of faces to train on. Order and changes depend on the seed, the epoch and the batch alone.

    Each item is a pair: (b, side, side, 1) float32 images from 0 to 255, and (b, 7) float32 labels, one-hot or, with
    mixup, blended as the images are. An incomplete batch waits for the next epoch's order. Of several processes each
    has its own rows of the same batches: everything is drawn for the whole batch.
    """

    def __init__(self, images, labels, recipe, batch_size, seed):
        super().__init__(workers=max(1, (os.cpu_count() or 1) // 2))  # threads: OpenCV leaves Python's lock
        self.images, self.recipe, self.seed = images, recipe, seed
        self.batch_size = min(batch_size, len(images) - len(images) % device_count())
        self.own = np.arange(self.batch_size)[own_rows(self.batch_size)]  # here, since threads know no distribution
        self.labels = keras.utils.to_categorical(labels, len(utils.EMOTIONS)).astype(np.float32)
        self.network = None
        self.start_epoch(0)

    def start_epoch(self, epoch):
        self.epoch, self.side = epoch, self.recipe.side(epoch)
        self.strength = 0.0 if self.recipe.is_calm(epoch) else 1.0
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))

    def adapt(self, model, weights):
        """Move the targets towards what a model with these weights says of the faces and of their mirror images."""
        self.network = self.network or keras.models.clone_model(model)  # one, so that it is compiled once
        self.network.set_weights(weights)
        said = (predict(self.network, self.images) + predict(self.network, self.images[:, :, ::-1])) / 2
        self.labels = (1 - self.recipe.adapted) * self.labels + self.recipe.adapted * said

    def __len__(self):
        return len(self.images) // self.batch_size

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, self.epoch, index])
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        recipe, own, rows = self.recipe, self.own, self.own
        is_mixed = recipe.mixup and self.strength
        if is_mixed:
            share = rng.beta(recipe.mixup, recipe.mixup, len(chosen)).astype(np.float32)[own, None]
            partner = rng.permutation(len(chosen))[own]
            rows = np.union1d(own, partner)
        if recipe.augmented:
            faces = augment(self.images[chosen], self.side, rng, recipe.erasing * self.strength, recipe.camera, rows)
        else:
            faces = plain_faces(self.images[chosen[rows]], self.side)
        labels = self.labels[chosen[own]]
        if is_mixed:
            labels = share * labels + (1 - share) * self.labels[chosen[partner]]
            other, share = faces[np.searchsorted(rows, partner)], share[..., None, None]
            faces = faces[np.searchsorted(rows, own)]
            faces *= share
            faces += np.multiply(other, 1 - share, out=other)
        return faces, labels


class HeldOut(keras.utils.PyDataset):
    """Faces as they are, in batches, at the side that the training faces have at the moment.

    Where the last batch cannot be shared by all devices, faces of weight 0 fill it up. The weights of the others make
    up for them in the mean over all rows, which Keras takes as the loss.

    Args:
        images, labels: (n, 48, 48) uint8 and (n,).
        batches: FaceBatches, whose side they have; whole faces without.
    """

    def __init__(self, images, labels, batches=None, batch_size=256):
        super().__init__()
        count, devices = len(images), device_count()
        total, batch_size = -(-count // devices) * devices, -(-batch_size // devices) * devices
        rows = [np.arange(first, min(first + batch_size, total)) for first in range(0, total, batch_size)]
        self.batches, self.rows = batches, [part[own_rows(len(part))] for part in rows]
        self.weights = (
            np.where(np.arange(total) < count, total / count, 0).astype(np.float32) if total > count else None
        )
        sides = {batches.recipe.side(0), utils.SIDE} if batches else {utils.SIDE}
        self.images = {side: plain_faces(images, side) for side in sides}
        self.labels = keras.utils.to_categorical(labels, len(utils.EMOTIONS))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        rows = self.rows[index]
        face = rows % len(self.labels)
        side = self.batches.side if self.batches else utils.SIDE
        item = self.images[side][face], self.labels[face]
        return item if self.weights is None else (*item, self.weights[rows])


# ----------------------------------------------------------------------------------------------------------- run


def read_rows(path):
    """Return the rows of a CSV file as dictionaries of str; none if it is not there."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []


def write_rows(path, rows):
    """Write dictionaries as a CSV file, with a column for every key that one of them has."""
    with utils.replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)


def is_recorded(rows, arguments):
    """Whether one of the rows of a table, see `read_rows`, is of a run with these arguments."""
    wanted = {name: str(value) for name, value in arguments.items()}
    return any(wanted.items() <= row.items() for row in rows)


def read_log(path):
    """Return the log of a run: a dictionary of lists of float, one entry an epoch; empty if there is none yet."""
    rows = read_rows(path)
    return {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}


class State:
    """What a run knows after an epoch: weights, the optimiser's variables, the targets, the best weights, and the log.

    It is one file, written whole, and the file of the epoch before is kept: a run that is stopped at any moment goes on
    from the newest that reads. The best weights are also in weights.npz.

    Args:
        run: Path of the run's folder.
    """

    def __init__(self, run):
        self.run, self.arrays, self.log = run, {}, []
        for file in run.glob("state*.npz"):
            try:
                with np.load(file) as arrays:
                    log = json.loads(str(arrays["log"]))
                    if len(log) > len(self.log):
                        self.log, self.arrays = log, {name: arrays[name] for name in arrays.files}
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                pass  # the run was killed while this one was written; the other one is whole

    def losses(self, recipe):
        """Return the validation losses of the epochs with whole faces."""
        return [row["val_loss"] for row in self.log[recipe.small_epochs :]]

    @property
    def best(self):
        """The best weights so far, in the order of `model.get_weights()`; an empty list before there are any."""
        return self._list("best")

    def restore(self, model, batches):
        """Give a compiled model and its batches all that they had after the newest epoch."""
        model.optimizer.build(model.trainable_variables)
        if self.arrays:
            batches.labels = self.arrays["targets"]
            model.set_weights(self._list("weight"))
            for variable, value in zip(model.optimizer.variables, self._list("optimizer"), strict=True):
                variable.assign(value)

    def save(self, model, batches, best):
        """Write the state after the newest epoch of the log; `best` are the weights of that epoch if it is the best."""
        kept = self.best if best is None else best
        lists = {
            "weight": model.get_weights(),
            "optimizer": [keras.ops.convert_to_numpy(variable) for variable in model.optimizer.variables],
            "best": kept,
        }
        arrays = {f"{name}{place}": array for name, values in lists.items() for place, array in enumerate(values)}
        self.arrays = arrays | {"targets": batches.labels, "log": np.array(json.dumps(self.log))}
        if not is_first():
            return
        with utils.replacing(self.run / f"state{len(self.log) % 2}.npz") as path:
            np.savez(path, **self.arrays)
        self.write_copies()

    def write_copies(self):
        """Write what people and other programs read, the log and the best weights, from the state."""
        if self.log:
            write_rows(self.run / "log.csv", self.log)
        if self.best:
            with utils.replacing(self.run / "weights.npz") as path:
                np.savez(path, *self.best)

    def _list(self, name):
        count = sum(key.rstrip("0123456789") == name for key in self.arrays)
        return [self.arrays[f"{name}{place}"] for place in range(count)]


DIGITS = 5  # of the figures in the log


def is_over(losses, patience):
    """Whether the last `patience` of the validation losses of whole faces bring none that is lower than before."""
    return bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience


class Epochs(keras.callbacks.Callback):
    """Prepares each epoch, keeps its state, and stops the training early.

    A resumed run sees the same batches and dropout as one that was not stopped: both are seeded by the epoch. It comes
    before SwapEMAWeights, so that the weights that were validated, the averaged ones, are there when a test ends.
    """

    def __init__(self, state, batches, patience):
        super().__init__()
        self.state, self.batches, self.patience = state, batches, patience

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()
        self.batches.start_epoch(epoch)
        for layer in self.model.layers:
            if isinstance(layer, layers.Dropout):
                layer.seed_generator.state.assign([self.batches.seed, epoch])

    def on_test_begin(self, logs=None):
        self.seconds = time.perf_counter() - self.start

    def on_test_end(self, logs=None):
        self.validated = self.model.get_weights()

    def on_epoch_end(self, epoch, logs):
        if not np.isfinite([logs["loss"], logs["val_loss"]]).all():
            raise utils.InputError(
                f"the training diverged in epoch {epoch + 1}: the same command with --precision float32 goes on from "
                "the epoch before"
            )
        recipe = self.batches.recipe
        row = {
            "epoch": epoch + 1,
            "side": self.batches.side,
            **{name: round(value, DIGITS) for name, value in logs.items()},
        }
        row["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        row["seconds"] = round(self.seconds, 2)
        self.state.log.append(row)
        losses = self.state.losses(recipe)
        is_best = bool(losses) and int(np.argmin(losses)) == len(losses) - 1
        self.model.stop_training = is_over(losses, self.patience)
        if recipe.adapts_after(epoch):
            self.batches.adapt(self.model, self.validated)
        self.state.save(self.model, self.batches, self.validated if is_best else None)
        whole = sum((recipe.side(later) / self.batches.side) ** 2 for later in range(epoch + 1, recipe.epochs))
        left = round(whole * (time.perf_counter() - self.start) / 60)
        print(
            f"epoch {epoch + 1}: loss {row['loss']:.3f}, on the validation faces {row['val_loss']:.3f}, accuracy "
            f"{row['val_accuracy']:.1%}; {self.seconds:.0f} s, about {left // 60} h {left % 60:02d} min left",
            flush=True,
        )


def compile_model(model, recipe, steps):
    """Compile a model with the recipe's optimiser, schedule and loss, for epochs of `steps` batches."""
    warm_up = min(2, recipe.epochs / 4) * steps
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, recipe.epochs * steps - warm_up, warmup_target=recipe.learning_rate, warmup_steps=warm_up
    )
    # An average over more than a twentieth of the run would lag behind it.
    average = min(recipe.average, max(0.0, 1 - 20 / (recipe.epochs * steps)))
    options = {"weight_decay": recipe.weight_decay, "clipnorm": 5.0, "use_ema": average > 0, "ema_momentum": average}
    if recipe.optimizer == "adamw":
        optimizer = keras.optimizers.AdamW(schedule, **options)
    else:
        optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, **options)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=recipe.smoothing)
    model.compile(optimizer, loss, weighted_metrics=["accuracy"])


def fast_precision():
    """Return the precision that this machine computes fast in: mixed_bfloat16 or float32.

    Several devices are told by their kind, since all processes of a training need the same precision.
    """
    if device_count() > 1:
        return "float32" if keras.distribution.list_devices()[0].startswith("cpu") else "mixed_bfloat16"
    seconds = {}
    for dtype in ("float32", "bfloat16"):
        faces, kernel = keras.ops.ones((32, 32, 32, 64), dtype), keras.ops.ones((3, 3, 64, 64), dtype)
        for _ in range(3):  # the first one is slower
            start = time.perf_counter()
            keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.max(keras.ops.conv(faces, kernel)), "float32"))
            seconds[dtype] = time.perf_counter() - start
    return "mixed_bfloat16" if seconds["bfloat16"] < 0.8 * seconds["float32"] else "float32"


def recall_precision(run, asked):
    """Return the precision of a run: what is asked for, or what it had before it was stopped, or what is fast here."""
    file = run / "precision"
    kept = file.read_text().strip() if file.is_file() else ""
    return asked or (kept if kept in PRECISIONS else fast_precision())


def fingerprint(*parts):
    """Return what `start_run` keeps of the faces that a run sees: a number of all pairs (images, labels), in order."""
    arrays = [
        np.ascontiguousarray(array, kind) for part in parts for array, kind in zip(part, ("u1", "<i8"), strict=True)
    ]
    return {"data": f"{functools.reduce(lambda crc, array: zlib.crc32(array, crc), arrays, 0):08x}"}


def has_ended(run):
    """Whether all is in the folder of a run that a training leaves at its end, perhaps on another machine."""
    return all((run / name).is_file() for name in ("finished", "log.csv", "weights.npz"))


def _started_with(run):
    """Return the arguments that a run was started with; None if there is no such run yet.

    Raises:
        InputError: they are broken, or missing where a run has begun.
    """
    file = run / "arguments.json"
    try:
        started = json.loads(file.read_text())
    except FileNotFoundError:
        if not any(run.glob("state*.npz")) and not has_ended(run):
            return None
        started = None
    except ValueError:
        started = None
    if not isinstance(started, dict):
        raise utils.InputError(f"{file} is broken or missing; delete {run} to train anew")
    return started


def is_unsaved(run, arguments, log):
    """Whether a run with these arguments has ended, and the results hold no such log.

    Args:
        run: Path of the folder of the run.
        arguments: as for `start_run`.
        log: Path of the log in the results.

    Raises:
        InputError: see `start_run`.
    """
    started = _started_with(run)
    if not started or not arguments.items() <= started.items() or not has_ended(run):
        return False
    return not log.is_file() or log.read_bytes() != (run / "log.csv").read_bytes()


@together()
def start_run(run, arguments, again=False):
    """Make the folder of a run, or check that the run which is there was started with the same arguments.

    Args:
        run: Path of the folder.
        arguments: dictionary of all that the run depends on.
        again: whether a finished run with the same arguments is removed first.

    Raises:
        InputError: it was started with others, or nobody knows with which.
    """
    started = {"data": arguments.get("data")} | (_started_with(run) or arguments)  # older runs did not keep it
    changed = [name for name in arguments if started.get(name) != arguments[name]]
    if changed:
        raise utils.InputError(
            f"{run} holds a run with another {', '.join(changed)}: give --run another folder, or delete this one"
        )
    agree(json.dumps(arguments))
    if again and has_ended(run):
        agree("all processes have seen that it has ended")
        if is_first():
            shutil.rmtree(run)
        agree("it is removed")
    if is_first():
        with utils.replacing(run / "arguments.json") as path:
            path.write_text(json.dumps(arguments, indent=2) + "\n")


@together()
def train(run, model, recipe, faces, held_out, batch_size, seed, patience):
    """Train a model to the end of its recipe in the folder `run`, going on where an earlier call was stopped.

    Args:
        run: Path of the folder, which gets the state, log.csv, weights.npz, and TensorBoard's files.
        model: keras.Model, (n, side, side, 1) float32 from 0 to 255 to (n, 7) softmax.
        recipe: a Recipe.
        faces: pair of (n, 48, 48) uint8 images and (n,) labels to train on.
        held_out: the same, to validate on.
        batch_size, seed: of the batches.
        patience: epochs without a better validation loss, on whole faces, after which it stops.

    Raises:
        InputError: another process trains in this folder.
    """
    with utils.locked(run) if is_first() else nullcontext():
        state = State(run)
        agree(json.dumps(state.log))
        if is_first():
            state.write_copies()  # a run may have been killed between the two
            with utils.replacing(run / "precision") as path:
                path.write_text(next(layer.dtype_policy.name for layer in model.layers if layer.weights))
        batches = FaceBatches(*faces, recipe, batch_size, seed)
        compile_model(model, recipe, len(batches))
        for end in (recipe.small_epochs, recipe.epochs):  # TensorFlow wants faces of one size in a call of fit
            if len(state.log) >= end or is_over(state.losses(recipe), patience):
                continue
            state.restore(model, batches)
            callbacks = [Epochs(state, batches, patience)]
            if model.optimizer.use_ema:
                callbacks.append(keras.callbacks.SwapEMAWeights())
            # Keras' callback writes with both of them, whatever the backend is; without them there are no such files.
            if is_first() and all(importlib.util.find_spec(name) for name in ("tensorflow", "tensorboard")):
                callbacks.append(keras.callbacks.TensorBoard(run / "tensorboard", write_graph=False))
            batches.start_epoch(len(state.log))
            model.fit(
                batches,
                validation_data=HeldOut(*held_out, batches),
                initial_epoch=len(state.log),
                epochs=end,
                shuffle=False,  # the batches are shuffled by epoch, so that a resumed run sees the same order
                callbacks=callbacks,
                verbose=0,
            )


def load_weights(model, run):
    """Give a model the best weights of a run."""
    with np.load(run / "weights.npz") as arrays:
        model.set_weights([arrays[f"arr_{place}"] for place in range(len(arrays.files))])


# --------------------------------------------------------------------------------------- calibration and scores


def reset_norms(model, faces, batch_size=256):
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


def predict(model, images):
    """Return (n, 7) float32 probabilities for (n, 48, 48) uint8 faces."""
    distribution = keras.distribution.distribution()
    if distribution:  # every process gets the answers for all rows
        layout = keras.distribution.TensorLayout((None, None), distribution.device_mesh)
        gather = layers.Lambda(lambda answers: keras.distribution.distribute_tensor(answers, layout))
        model = keras.Model(model.inputs, gather(model.outputs[0]))
    return model.predict(HeldOut(images, np.zeros(len(images), int)), verbose=0)[: len(images)]


def scores(probabilities, labels):
    """Return the accuracy, 0 to 1, and the mean cross-entropy in nats of (n, 7) probabilities.

    Raises:
        InputError: some of them are NaN.
    """
    if not np.isfinite(probabilities).all():
        raise utils.InputError("the network answers with NaN: its training diverged")
    right = np.maximum(probabilities[np.arange(len(labels)), labels].astype(np.float64), 1e-12)
    return round(float((probabilities.argmax(axis=1) == labels).mean()), 4), round(float(-np.log(right).mean()), 4)


def fit_temperature(probabilities, labels):
    """Return the temperature, from 0.25 to 4, with the lowest cross-entropy (Guo et al. 2017, arXiv:1706.04599).

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


def finish(model, run, recipe, faces, held_out):
    """Give a model the best weights of a run, plain batch norms and a temperature, and measure it.

    Args:
        model: built as for `train`, for faces of 48x48; its last weights are in a layer named "emotion".
        run, recipe, faces, held_out: see `train`.

    Returns:
        dict of figures.
    """
    log = read_log(run / "log.csv")
    load_weights(model, run)
    before = scores(predict(model, held_out[0]), held_out[1])
    reset_norms(model, plain_faces(faces[0][:: max(1, len(faces[0]) // 5000)]))
    uncalibrated = predict(model, held_out[0])
    temperature = fit_temperature(uncalibrated, held_out[1])
    last = model.get_layer("emotion")
    last.set_weights([weights / temperature for weights in last.get_weights()])
    calibrated, step = predict(model, held_out[0]), max(1, len(faces[0]) // 3000)
    accuracy, cross_entropy = scores(calibrated, held_out[1])
    later = log["val_loss"][recipe.small_epochs :]
    return {
        "parameters": model.count_params(),
        "train_images": len(faces[0]),
        "validation_images": len(held_out[0]),
        "epochs_trained": len(log["epoch"]),
        "best_epoch": recipe.small_epochs + 1 + int(np.argmin(later)),
        "validation_accuracy": accuracy,
        "validation_cross_entropy": cross_entropy,
        "validation_accuracy_with_norms_of_training": before[0],
        "training_accuracy": scores(predict(model, faces[0][::step]), faces[1][::step])[0],
        "temperature": round(temperature, 4),
        "validation_calibration_error": round(utils.calibration_error(calibrated, held_out[1]), 4),
        "validation_calibration_error_before": round(utils.calibration_error(uncalibrated, held_out[1]), 4),
        "minutes": round(sum(log["seconds"]) / 60, 1),
    }


def describe(figures):
    """Return the figures of a run, see `finish`, as lines of text."""
    accuracy, count = float(figures["validation_accuracy"]), int(figures["validation_images"])
    error = 1.96 * np.sqrt(accuracy * (1 - accuracy) / count)
    return [
        f"    {int(figures['parameters']):,} parameters; {figures['epochs_trained']} epochs in {figures['minutes']} "
        f"minutes; the weights of epoch {figures['best_epoch']} are kept.",
        f"    Validation faces: {accuracy:.1%} right (+-{error:.1%}), cross-entropy "
        f"{float(figures['validation_cross_entropy']):.3f}. Training faces: {float(figures['training_accuracy']):.1%}.",
    ]


def architecture_text(why, title, introduction, rows, base, questions, model):
    """Return a text on a model: why it is built as it is, the runs that led to it, and its layers.

    Args:
        why: lines of text.
        title, introduction: what stands above the runs.
        rows: of the runs, dictionaries; the first value in each is the run's name.
        base: the Recipe that the runs are compared with; what differs from it is told.
        questions: what each run asked, by its name.
        model: keras.Model.
    """
    lines = ["WHY THIS ARCHITECTURE", "", why, "", title, "", introduction]
    for row in rows:
        name = next(iter(row.values()))
        changes = [f"{key} {row[key]}" for key, value in asdict(base).items() if str(value) != str(row[key])]
        lines += ["", f"{name}: {questions[name]}"]
        lines += textwrap.wrap(
            f"[{', '.join(changes) or 'the yardstick'}]", 116, initial_indent="    ", subsequent_indent="    "
        )
        lines += describe(row)
    lines += ["", "THE LAYERS", ""]
    model.summary(line_length=100, print_fn=lines.append)
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------- plots


def plot_learning_curves(log, kept, spans):
    """Return a matplotlib figure of loss and accuracy over the epochs.

    Args:
        log: as `read_log` gives it.
        kept: the epoch whose weights are kept.
        spans: what was special in some of the epochs: text to the number of epochs before, and the last of them.
    """
    import matplotlib.pyplot as plt  # here, because a machine that only trains needs none

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, name, unit in zip(axes, ("loss", "accuracy"), ("cross-entropy, nats", "share of faces"), strict=True):
        axis.plot(log["epoch"], log[name], "--", color="#D55E00", label="training faces, as they were changed")
        axis.plot(log["epoch"], log[f"val_{name}"], "-", color="#0072B2", label="validation faces")
        axis.axvline(kept, color="black", linestyle=":", label="the weights that are kept")
        for place, (text, (before, last)) in enumerate(spans.items()):
            last = min(last, len(log["epoch"]))  # it may have stopped early
            if before < last:
                grey = str(0.95 - 0.06 * place)
                axis.axvspan(before + 0.5, last + 0.5, color=grey, linewidth=0, label=text, zorder=0)
        axis.set(xlabel="epoch", ylabel=f"{name} ({unit})")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def save_plot(path, plot, *arguments):
    """Save the matplotlib figure that `plot(*arguments)` returns, where matplotlib is installed."""
    try:
        utils.save_fig(plot(*arguments), path)
    except ImportError:
        print(f"matplotlib is not installed: {path.name} was not drawn")
