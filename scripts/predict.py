# Generated from notebooks/05_evaluation.ipynb by `make scripts`: edit the notebook, not this file.
"""Measures the accuracy of a saved model on the test rows of FER2013."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import utils


def bootstrap_interval(statistic, *columns, draws=1000):
    """Return the 95 % interval of a statistic: percentiles of bootstrap draws, as two floats.

    Args:
        statistic: takes arrays like `columns` and returns a number.
        columns: arrays of the same length n, drawn together; the draws are the same in every call with that n.
    """
    rng = np.random.default_rng(0)
    count = len(columns[0])
    values = []
    for _ in range(draws):
        chosen = rng.integers(0, count, count)
        values.append(statistic(*(column[chosen] for column in columns)))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def describe(name, hits):
    """Return one line with the share of `hits`, (n,) bool, and its interval."""
    if not len(hits):
        return f"{name:<12} no images"
    low, high = bootstrap_interval(np.mean, hits)
    return f"{name:<12} {hits.mean():6.1%}  ({low:.1%} to {high:.1%})  {hits.sum()} of {len(hits)}"


def parse_args(argv=None):
    """Parse the command line, `sys.argv[1:]` unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=str, default="", help="a pickled Keras model; empty for results/model/my_own_model.pkl"
    )
    parser.add_argument("--data", type=str, default="", help="folder with FER2013; empty for data")
    parser.add_argument(
        "--verbose",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also print PublicTest, PrivateTest and each emotion, with 95 %% intervals (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(model: str, data: str, verbose: bool):
    images, labels = utils.load_fer2013("test", data or None)
    network = utils.load_model(model or None)
    probabilities = network.predict(images[..., None].astype(np.float32), batch_size=256, verbose=0)
    hits = probabilities.argmax(axis=1) == labels
    print(f"Accuracy on test set: {hits.mean():.0%}")

    if verbose:
        print(describe("test set", hits))
        try:
            public = len(utils.load_fer2013("public_test", data or None)[1])  # the first rows of the test set
        except utils.InputError as error:
            print(error)
        else:
            print(describe("PublicTest", hits[:public]))
            print(describe("PrivateTest", hits[public:]))
        for label, emotion in enumerate(utils.EMOTIONS):
            print(describe(emotion, hits[labels == label]))


if __name__ == "__main__":
    utils.run_script(main, parse_args)
