"""The downloaded FER2013 is the published one."""

import hashlib
import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest

import utils
from tests.conftest import needs_data

USAGES = {"train": "Training", "public_test": "PublicTest", "private_test": "PrivateTest"}
has_usage = any((utils.DATA / name).is_file() for name in ("icml_face_data.csv", "fer2013.tar.gz"))
needs_usage = pytest.mark.skipif(not has_usage, reason="no icml_face_data.csv: `make data` says how to get it")

pytestmark = needs_data


@pytest.mark.parametrize("split", ["train", *(pytest.param(split, marks=needs_usage) for split in list(USAGES)[1:])])
def test_images_and_class_counts(split):
    images, labels = utils.load_fer2013(split)
    assert images.dtype == np.uint8 and images.shape == (len(labels), utils.SIDE, utils.SIDE)
    assert images.min() == 0 and images.max() == 255
    counts = np.bincount(labels, minlength=len(utils.EMOTIONS))
    assert tuple(counts) == utils.FER2013_CLASS_COUNTS[USAGES[split]]


@needs_usage
def test_the_test_set_is_public_then_private():
    images, labels = utils.load_fer2013("test")
    (public, public_labels), (private, private_labels) = map(utils.load_fer2013, ("public_test", "private_test"))
    np.testing.assert_array_equal(images, np.concatenate([public, private]))
    np.testing.assert_array_equal(labels, np.concatenate([public_labels, private_labels]))


def test_a_second_load_reads_the_cache_and_no_csv(monkeypatch):
    images, labels = utils.load_fer2013("train")
    monkeypatch.setattr(utils, "read_fer2013_csv", None)
    again = utils.load_fer2013("train")
    assert (again[0] == images).all() and (again[1] == labels).all()


def test_the_readme_tells_how_large_the_training_faces_are():
    utils.load_fer2013("train")
    size = f"({(utils.DATA / 'cache' / 'train.npz').stat().st_size / 1e6:.0f} MB)"
    assert size in (utils.ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert f"One file of {size[1:-1]} holds the faces" in (utils.ROOT / "README.md").read_text(encoding="utf-8")


def test_no_twin_is_in_training_and_validation():
    images, labels = utils.load_fer2013("train")
    train, validation = utils.split_validation(images, labels)
    assert len(validation) == pytest.approx(0.1 * len(images), rel=0.02)
    assert not {images[i].tobytes() for i in train} & {images[i].tobytes() for i in validation}


@needs_usage
def test_the_list_of_twins_is_true_and_whole():
    """Each exact twin in results/eda/twins.csv has one in its group, and none that is in two splits is missing."""
    table = pd.read_csv(utils.RESULTS / "eda" / "twins.csv")
    splits = {usage.replace("Training", "train"): utils.load_fer2013(split)[0] for split, usage in USAGES.items()}
    digests = {name: [hashlib.sha256(image).hexdigest()[:16] for image in images] for name, images in splits.items()}
    assert all(digest in set(digests[name]) for name, digest in zip(table["set"], table["sha256"], strict=True))
    assert (table[table["exact"]].groupby(["group", "sha256"]).size() > 1).all()
    train, listed = set(digests["train"]), Counter(zip(table["set"], table["sha256"], strict=True))
    leaked = Counter(
        (name, digest) for name in ("PublicTest", "PrivateTest") for digest in digests[name] if digest in train
    )
    metrics = json.loads((utils.RESULTS / "eda" / "metrics.json").read_text())
    assert leaked <= listed and leaked.total() == metrics["exact twins"]["test images with a twin in train"]


def test_the_validation_faces_do_not_depend_on_the_order_of_the_rows():
    """Copies of FER2013 have their rows in different orders, and the networks that ship must not know these faces."""
    images, labels = utils.load_fer2013("train")
    _, validation = utils.split_validation(images, labels)
    _, other = utils.split_validation(images[::-1], labels[::-1])
    assert {images[i].tobytes() for i in validation} == {images[::-1][i].tobytes() for i in other}
