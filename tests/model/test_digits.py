"""What the first notebook left in results/mnist: is it in Kaggle's format, and as good as the notebook wants it?"""

import json

import pandas as pd

import utils

FOLDER = utils.RESULTS / "mnist"


def test_the_submission_is_in_kaggles_format():
    table = pd.read_csv(FOLDER / "submission.csv")
    assert table.columns.tolist() == ["ImageId", "Label"]
    assert table["ImageId"].tolist() == list(range(1, 28_001))
    shares = table["Label"].value_counts(normalize=True)
    assert set(shares.index) == set(range(10)) and shares.between(0.08, 0.12).all()  # as frequent as digits are


def test_the_digits_are_read():
    metrics = json.loads((FOLDER / "metrics.json").read_text())
    results = metrics["results"]
    assert metrics["held out"] > 4000
    assert results["logistic regression"]["accuracy"] > 0.92
    assert results["first CNN"]["accuracy"] > 0.97
    assert results["kept"]["accuracy"] > 0.995
    for result in results.values():
        assert result["accuracy"] == round(1 - result["wrong"] / metrics["held out"], 5)
