"""Loading FER2013 in every layout in which it is handed round, and splitting it."""

import csv
import io
import os
import tarfile

import numpy as np
import pytest

import utils

LAYOUTS = {  # the files of each, as get_data.py leaves them in a folder
    "challenge": ("train.csv", "test.csv", "icml_face_data.csv"),
    "course": ("train.csv", "test.csv", "test_with_emotions.csv"),
    "indexed": ("train.csv", "test_with_emotions.csv (indexed)"),
    "one file": ("icml_face_data.csv",),
    "original": ("fer2013.tar.gz",),
}
GOOD = " ".join(["7"] * utils.SIDE**2)


def read_rows(path):
    """Return (emotion, Usage, pixels) of every row of an icml_face_data.csv."""
    with open(path, newline="") as file:
        return list(csv.reader(file))[1:]


def write_layout(rows, folder, layout):
    """Write `rows`, as read_rows returns them, into `folder` as the files of a layout."""
    train = [row for row in rows if row[1] == "Training"]
    test = [row for row in rows if row[1] != "Training"]
    texts = {
        "train.csv": ["emotion,pixels", *(f'{emotion},"{pixels}"' for emotion, _, pixels in train)],
        "test.csv": ["pixels", *(pixels for _, _, pixels in test)],
        "test_with_emotions.csv": ["emotion,pixels", *(f"{emotion},{pixels}" for emotion, _, pixels in test)],
        "test_with_emotions.csv (indexed)": [
            ",emotion,pixels",
            *(f"{index},{emotion},{pixels}" for index, (emotion, _, pixels) in enumerate(test)),
        ],
        "icml_face_data.csv": ["emotion, Usage, pixels", *(",".join(row) for row in rows)],
        "fer2013.csv": ["emotion,pixels,Usage", *(f"{emotion},{pixels},{usage}" for emotion, usage, pixels in rows)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in LAYOUTS[layout]:
        if name == "fer2013.tar.gz":
            with tarfile.open(folder / name, "w:gz", compresslevel=1) as archive:
                for member, lines in (("fer2013/README", ["read me"]), ("fer2013/fer2013.csv", texts["fer2013.csv"])):
                    content = "\n".join(lines).encode()
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        else:
            (folder / name.removesuffix(" (indexed)")).write_text("\n".join(texts[name]) + "\n")


def as_arrays(rows):
    """Return the images and labels of `rows`, without the code under test."""
    images = np.array([row[2].split() for row in rows], np.uint8).reshape(-1, utils.SIDE, utils.SIDE)
    return images, np.array([int(row[0]) for row in rows])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_arrays(layout, small_fer2013, tmp_path):
    rows = read_rows(small_fer2013 / "icml_face_data.csv")
    write_layout(rows, tmp_path, layout)
    usages = {"train": ["Training"], "test": ["PublicTest", "PrivateTest"]}
    if layout not in ("course", "indexed"):
        usages |= {"public_test": ["PublicTest"], "private_test": ["PrivateTest"]}
    for split, wanted in usages.items():
        images, labels = utils.load_fer2013(split, tmp_path)
        expected_images, expected_labels = as_arrays([row for row in rows if row[1] in wanted])
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, expected_images)
        np.testing.assert_array_equal(labels, expected_labels)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([f"0,{GOOD}", f"1,{GOOD[:-1]}x"], ["line 3", "pixel 2303 is 'x'", "0 to 255"]),
        ([f"0,{GOOD}", f"1,{GOOD[:-1]}6.5"], ["line 3", "'6.5'"]),
        ([f"0,{GOOD}", f"1,{GOOD[:-2]}"], ["line 3", "2303 pixels", "2304"]),
        ([f"0,{GOOD}", f"1,{GOOD} 7"], ["line 3", "2305 pixels", "2304"]),
        ([f"0,{GOOD[:-1]}256"], ["line 2", "256", "0 to 255"]),
        ([f"0,{GOOD[:-1]}-1"], ["line 2", "-1", "0 to 255"]),
        ([f"0,{GOOD[:-1]}{'9' * 20}"], ["line 2", "9" * 20, "0 to 255"]),
        ([f"7,{GOOD}"], ["line 2", "emotion is '7'", "0 to 6"]),
        ([f",{GOOD}"], ["line 2", "emotion is ''", "0 to 6"]),
        ([f"0,{GOOD}", "1"], ["line 3", "1 columns", "2"]),
        ([], ["no rows", "make data"]),
    ],
)
def test_a_broken_row_is_named_with_file_line_and_reason(rows, words, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("\n".join(["emotion,pixels", *rows]) + "\n")
    with pytest.raises(utils.InputError) as error:
        utils.load_fer2013("train", tmp_path)
    for word in [str(path), *words]:
        assert word in str(error.value)
    assert not list(tmp_path.rglob("*.npz"))  # and nothing of it is remembered


def test_an_unknown_usage_is_named(tmp_path):
    (tmp_path / "icml_face_data.csv").write_text(f"emotion, Usage, pixels\n0,Training,{GOOD}\n0,Validation,{GOOD}\n")
    with pytest.raises(utils.InputError, match="line 3: Usage is 'Validation'; expected one of Training, PublicTest"):
        utils.load_fer2013("test", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.csv", b"", ["pixels"]),
        ("train.csv", b"<!DOCTYPE html>", ["<!doctype html>", "pixels"]),
        ("train.csv", b"emotion,pixels\n0,\xff\xfe\x00", ["broken"]),
        ("train.csv", b"pixels\n" + GOOD.encode(), ["no emotion column"]),
        ("fer2013.tar.gz", b"\x1f\x8b\x08\x00 half of it", ["broken"]),
        ("fer2013.tar.gz", b"", ["broken"]),
    ],
)
def test_a_file_that_is_not_fer2013_is_named(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(utils.InputError) as error:
        utils.load_fer2013("train", tmp_path)
    for word in [str(tmp_path / name), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [lambda whole: whole[: len(whole) // 2], lambda whole: whole[:-8] + b"checksum"],
    ids=["half", "wrong checksum"],
)
def test_a_damaged_tar_is_named(damage, tmp_path):
    write_layout([("0", "Training", GOOD)], tmp_path, "original")
    path = tmp_path / "fer2013.tar.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(utils.InputError, match="fer2013.tar.gz is broken"):
        utils.load_fer2013("train", tmp_path)


def test_a_byte_order_mark_does_not_hide_the_first_column(tmp_path):
    (tmp_path / "train.csv").write_text(f"pixels,emotion\n{GOOD},3\n", encoding="utf-8-sig")
    images, labels = utils.load_fer2013("train", tmp_path)
    assert images.shape == (1, utils.SIDE, utils.SIDE) and labels.tolist() == [3]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_said_with_what_to_do(split, tmp_path):
    with pytest.raises(utils.InputError, match=f"no {split} set in .*icml_face_data.csv.*make data"):
        utils.load_fer2013(split, tmp_path)


def test_public_test_needs_usage(small_fer2013, tmp_path):
    write_layout(read_rows(small_fer2013 / "icml_face_data.csv"), tmp_path, "course")
    with pytest.raises(utils.InputError, match="does not say which rows are public_test; icml_face_data.csv does"):
        utils.load_fer2013("public_test", tmp_path)


@pytest.fixture
def files_read(monkeypatch):
    """The names of the CSV files that were parsed, in order."""
    read, names = utils.read_fer2013_csv, []
    monkeypatch.setattr(utils, "read_fer2013_csv", lambda path: names.append(path.name) or read(path))
    return names


def test_train_never_opens_a_file_with_test_rows(small_fer2013, tmp_path, files_read):
    write_layout(read_rows(small_fer2013 / "icml_face_data.csv"), tmp_path, "challenge")
    utils.load_fer2013("train", tmp_path)
    assert files_read == ["train.csv"]


def test_cache_is_used_until_the_file_changes(tmp_path, files_read):
    path = tmp_path / "train.csv"
    path.write_text(f"emotion,pixels\n0,{GOOD}\n")
    first, again = utils.load_fer2013("train", tmp_path), utils.load_fer2013("train", tmp_path)
    assert len(files_read) == 1
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)

    path.write_text(f"emotion,pixels\n5,{GOOD}\n")  # as many bytes as before
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))
    assert utils.load_fer2013("train", tmp_path)[1].tolist() == [5]


def test_the_cache_alone_can_be_carried_to_another_machine(small_fer2013, tmp_path):
    """It is compressed, holds the same faces to the bit, and half of it is said to be broken."""
    expected = utils.load_fer2013("train", small_fer2013)
    content = (small_fer2013 / "cache" / "train.npz").read_bytes()
    assert len(content) < expected[0].nbytes
    (tmp_path / "train.npz").write_bytes(content)
    for one, other in zip(expected, utils.load_fer2013("train", tmp_path), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [path.name for path in tmp_path.iterdir()] == ["train.npz"]
    (tmp_path / "train.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(utils.InputError, match="train.npz is broken; copy it again"):
        utils.load_fer2013("train", tmp_path)


@pytest.fixture(scope="module")
def twins():
    """1,000 images, 40 of them Disgust; a third of them occurs twice, and some twins disagree about the emotion."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1000, utils.SIDE, utils.SIDE), dtype=np.uint8)
    labels = rng.choice([0, 2, 3, 4, 5, 6], 1000)
    labels[:40] = utils.EMOTIONS.index("Disgust")
    images[-333:] = images[:333]
    labels[-300:] = labels[33:333]
    return images, labels


def test_split_keeps_the_shares_of_the_classes(twins):
    images, labels = twins
    train, validation = utils.split_validation(images, labels, 0.2)
    assert sorted([*train, *validation]) == list(range(1000))
    for emotion in range(7):
        in_validation = (labels[validation] == emotion).sum()
        assert in_validation == pytest.approx(0.2 * (labels == emotion).sum(), rel=0.35)


def test_split_keeps_twins_on_one_side(twins):
    images, labels = twins
    train, validation = utils.split_validation(images, labels, 0.2)
    assert len(validation) > 100
    assert not {images[i].tobytes() for i in train} & {images[i].tobytes() for i in validation}


def test_of_two_splits_the_smaller_is_a_part_of_the_larger(twins):
    """What a network that learned from more faces was not shown, one that learned from fewer was not shown either."""
    small, large = (set(utils.split_validation(*twins, fraction)[1]) for fraction in (0.05, 0.2))
    assert 0 < len(small) < len(large) and small < large


def test_split_depends_on_the_seed_alone(twins):
    first, again, other = (utils.split_validation(*twins, 0.2, seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
    moved = np.random.default_rng(0).permutation(len(twins[1]))  # the rows of a file in another order
    assert {*moved[utils.split_validation(twins[0][moved], twins[1][moved], 0.2, 1)[1]]} == {*first}
