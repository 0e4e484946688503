"""Data sets in every layout that people have, each a small tree with pictures whose classes are known."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from maft_adapter.data import SegmentationDataset, class_list, open_dataset
from maft_adapter.data.check import check_dataset
from maft_adapter.data.datasets import FileDataset
from maft_adapter.data.layouts import LAYOUTS
from maft_adapter.pictures import read_picture
from maft_adapter.shapes import CLASSES, UNSEEN, render_scene, train_clip

VOC, CONTEXT, ADE = "VOCdevkit/VOC2012", "VOCdevkit/VOC2010", "ADEChallengeData2016"
FULL = "ADE20K_2021_17_01"
VOC_LIST = f"{VOC}/ImageSets/Segmentation/val.txt"
PICTURE, LABELS = f"{VOC}/JPEGImages/a.jpg", f"{VOC}/annotations_detectron2/val/a.png"
BYTE, WORD = {255: None}, {65535: None}

# data set, layout, its folder, picture, label file, value in it -> class, text file with the name
CASES: list[tuple[str, str, str, str, str, Mapping[int, int | None], str]] = [
    ("voc-20", "detectron2", VOC, "JPEGImages/a.jpg", "annotations_detectron2/val/a.png", {0: 0, 19: 19, **BYTE}, ""),
    ("voc-20", "detectron2", VOC, "images_detectron2/val/a.jpg", "annotations_detectron2/val/a.png", {19: 19}, ""),
    ("voc-20", "maft", VOC, "JPEGImages/a.jpg", "annotations_ovs/val/a.png", {0: 0, 19: 19, **BYTE}, ""),
    ("voc-20", "original", VOC, "JPEGImages/a.jpg",
     "SegmentationClass/a.png", {0: None, 1: 0, 20: 19, **BYTE}, "ImageSets/Segmentation/val.txt"),
    ("voc-20", "original", VOC, "JPEGImages/a.jpg",
     "SegmentationClassAug/a.png", {0: None, 1: 0}, "ImageSets/Segmentation/val.txt"),
    ("voc-20", "fc-clip", "pascal_voc_d2", "images/validation/a.jpg",
     "annotations_pascal20/validation/a.png", {19: 19, **BYTE}, ""),
    ("voc-20b", "detectron2", VOC, "JPEGImages/a.jpg",
     "annotations_detectron2_bg/val/a.png", {0: 0, 20: 20, **BYTE}, ""),
    ("voc-20b", "original", VOC, "JPEGImages/a.jpg",
     "SegmentationClass/a.png", {0: 20, 1: 0, 20: 19, **BYTE}, "ImageSets/Segmentation/val.txt"),
    ("voc-20b", "fc-clip", "pascal_voc_d2", "images/validation/a.jpg",
     "annotations_pascal21/validation/a.png", {0: 20, 20: 19, **BYTE}, ""),
    ("voc-21", "original", VOC, "JPEGImages/a.jpg",
     "SegmentationClass/a.png", {0: 0, 20: 20, **BYTE}, "ImageSets/Segmentation/val.txt"),
    ("voc-21", "fc-clip", "pascal_voc_d2", "images/validation/a.jpg",
     "annotations_pascal21/validation/a.png", {0: 0, 20: 20, **BYTE}, ""),
    ("coco-stuff", "detectron2", "coco", "val2017/a.jpg",
     "stuffthingmaps_detectron2/val2017/a.png", {0: 0, 170: 170, **BYTE}, ""),
    ("coco-stuff", "cat-seg", "coco-stuff", "images/val2017/a.jpg",
     "annotations_detectron2/val2017/a.png", {170: 170, **BYTE}, ""),
    ("coco-stuff", "zegformer", "coco/coco_stuff", "images/val2017/a.jpg",
     "annotations_detectron2/val2017_all/a.png", {170: 170}, ""),
    ("coco-stuff", "mmsegmentation", "coco_stuff164k", "images/val2017/a.jpg",
     "annotations/val2017/a_labelTrainIds.png", {170: 170, **BYTE}, ""),
    ("coco-stuff", "original", "coco", "val2017/a.jpg",
     "stuffthingmaps/val2017/a.png", {0: 0, 12: 11, 181: 170, **BYTE}, ""),
    ("coco-stuff", "original", "coco_stuff164k", "images/val2017/a.jpg",
     "annotations/val2017/a.png", {12: 11, 181: 170, **BYTE}, ""),
    ("ade20k-150", "detectron2", ADE, "images/validation/a.jpg",
     "annotations_detectron2/validation/a.png", {0: 0, 149: 149, **BYTE}, ""),
    ("ade20k-150", "detectron2", f"ade/{ADE}", "images/validation/a.jpg",
     "annotations_detectron2/validation/a.png", {149: 149}, ""),
    ("ade20k-150", "original", ADE, "images/validation/a.jpg",
     "annotations/validation/a.png", {0: None, 1: 0, 150: 149}, ""),
    ("ade20k-847", "detectron2", FULL, "images_detectron2/validation/a.jpg",
     "annotations_detectron2/validation/a.tif", {0: 0, 255: 255, 846: 846, **WORD}, ""),
    ("ade20k-847", "zegformer", FULL, "images_detectron2_freq/validation/a.jpg",
     "annotations_detectron2_freq/val_all/a.tif", {846: 846, **WORD}, ""),
    ("ade20k-847", "original", FULL, "images/ADE/validation/urban/street/a.jpg",
     "images/ADE/validation/urban/street/a_seg.png", {2978: 0, 3: None}, ""),
    ("context-59", "detectron2", CONTEXT, "JPEGImages/a.jpg",
     "annotations_detectron2/pc59_val/a.png", {0: 0, 58: 58, **BYTE}, ""),
    ("context-59", "maft", CONTEXT, "val/image/a.jpg",
     "annotations_detectron2_ovs/pc59_val/a.png", {58: 58, **BYTE}, ""),
    ("context-59", "fc-clip", "pascal_ctx_d2", "images/validation/a.jpg",
     "annotations_ctx59/validation/a.png", {58: 58, **BYTE}, ""),
    ("context-59", "mmsegmentation", CONTEXT, "JPEGImages/a.jpg",
     "SegmentationClassContext/a.png", {0: None, 1: 0, 59: 58}, "ImageSets/SegmentationContext/val.txt"),
    ("context-459", "detectron2", CONTEXT, "JPEGImages/a.jpg",
     "annotations_detectron2/pc459_val/a.tif", {0: 0, 255: 255, 458: 458, **WORD}, ""),
    ("context-459", "maft", CONTEXT, "JPEGImages/a.jpg",
     "annotations_detectron2_ovs/pc459_val/a.tif", {458: 458, **WORD}, ""),
    ("context-459", "fc-clip", "pascal_ctx_d2", "images/validation/a.jpg",
     "annotations_ctx459/validation/a.tif", {458: 458, **WORD}, ""),
    ("context-459", "original", CONTEXT, "JPEGImages/a.jpg",
     "trainval/a.mat", {0: None, 1: 0, 459: 458}, "ImageSets/SegmentationContext/val.txt"),
]  # fmt: skip


def write_picture(path: Path, shape: tuple[int, int], mode: str = "RGB", orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, shape[::-1])
    if orientation > 1:
        image.getexif()[0x0112] = orientation
    image.save(path, exif=image.getexif())


def write_labels(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mat":
        savemat(path, {"LabelMap": values.astype(np.uint16)})
    elif path.name.endswith("_seg.png"):
        pixels = np.stack([values // 256 * 10 + 3, values % 256, np.full_like(values, 9)], axis=-1)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    else:
        Image.fromarray(values.astype(np.uint8 if path.suffix == ".png" else np.uint16)).save(path)


def write_case(root: Path, picture: str, labels: str, values: Mapping[int, int | None], listed: str = "") -> None:
    row = np.array([sorted(values)] * 3)
    write_picture(root / picture, row.shape)
    write_labels(root / labels, row)
    if listed:
        (root / listed).parent.mkdir(parents=True, exist_ok=True)
        (root / listed).write_text("a\n")


def expected(values: Mapping[int, int | None], ignore: int) -> list[list[int]]:
    return [[ignore if (k := values[value]) is None else k for value in sorted(values)]] * 3


@pytest.mark.parametrize(("name", "layout", "base", "picture", "labels", "values", "listed"), CASES)
def test_every_layout(
    name: str,
    layout: str,
    base: str,
    picture: str,
    labels: str,
    values: Mapping[int, int | None],
    listed: str,
    tmp_path: Path,
) -> None:
    write_case(tmp_path / base, picture, labels, values, listed)
    dataset = open_dataset(name, tmp_path)
    assert (len(dataset), dataset.layout, dataset.name, dataset.names) == (1, layout, name, "plain")
    assert dataset.class_names == class_list(name).names
    item = dataset[0]
    assert item.labels.tolist() == expected(values, dataset.ignore_index)
    assert item.picture == tmp_path / base / picture
    assert item.name.endswith("a.jpg")
    assert len(list(dataset)) == 1
    (fault,) = check_dataset(dataset).faults
    assert fault.startswith("1 pictures, published are ")
    # the data set's own folder and those between, as well
    assert dataset.folder == tmp_path / base
    folder = dataset.folder
    while folder != tmp_path:
        np.testing.assert_array_equal(open_dataset(name, folder)[0].labels, item.labels)
        folder = folder.parent
    for other in set(LAYOUTS) - {name, "folder", "voc-20", "voc-20b", "voc-21"}:
        with pytest.raises(ValueError, match=f"no val part of {other}"):
            open_dataset(other, tmp_path)


def test_every_layout_is_tested() -> None:
    known = {(name, one.name) for name, layouts in LAYOUTS.items() for one in layouts if name != "folder"}
    assert {case[:2] for case in CASES} == known


def test_training_part_of_voc_is_all_that_is_not_listed(tmp_path: Path) -> None:
    """VOC's own labels where it has some, the others from SBD."""
    for name in "abcd":
        write_picture(tmp_path / VOC / "JPEGImages" / f"{name}.jpg", (2, 2))
        write_labels(tmp_path / VOC / "SegmentationClassAug" / f"{name}.png", np.full((2, 2), 2))
    for name in "ab":
        write_labels(tmp_path / VOC / "SegmentationClass" / f"{name}.png", np.full((2, 2), 1))
    (tmp_path / VOC_LIST).parent.mkdir(parents=True)
    (tmp_path / VOC_LIST).write_text("b\n")
    train = {item.name: int(item.labels[0, 0]) for item in open_dataset("voc-20", tmp_path, "train")}
    assert train == {"a.jpg": 0, "c.jpg": 1, "d.jpg": 1}
    assert [item.name for item in open_dataset("voc-20", tmp_path, "val")] == ["b.jpg"]


def test_a_list_that_names_all_leaves_nothing_for_training(tmp_path: Path) -> None:
    write_case(tmp_path, PICTURE, f"{VOC}/SegmentationClass/a.png", {1: 0}, VOC_LIST)
    with pytest.raises(ValueError, match="no train part of voc-20"):
        open_dataset("voc-20", tmp_path, "train")
    (tmp_path / VOC_LIST).write_text("")
    with pytest.raises(ValueError, match="no val part of voc-20"):
        open_dataset("voc-20", tmp_path)


def test_prepared_before_raw_and_raw_where_the_split_was_not_prepared(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        write_case(tmp_path, f"{ADE}/images/{split}/a.jpg", f"{ADE}/annotations/{split}/a.png", {1: 0})
    write_case(tmp_path, f"{ADE}/images/validation/a.jpg", f"{ADE}/annotations_detectron2/validation/a.png", {0: 0})
    val, train = (open_dataset("ade20k-150", tmp_path, split) for split in ("val", "train"))
    assert (val.layout, train.layout) == ("detectron2", "original")
    raw = open_dataset("ade20k-150", tmp_path, layout="original")
    assert raw.layout == "original"
    np.testing.assert_array_equal(raw[0].labels, val[0].labels)
    with pytest.raises(ValueError, match=r"layout fc-clip; known are detectron2, original, there is detectron2, orig"):
        open_dataset("ade20k-150", tmp_path, layout="fc-clip")


def test_one_layout_in_two_places_is_refused(tmp_path: Path) -> None:
    for parent in ("", "ade/"):
        folder = f"{parent}{ADE}"
        write_case(tmp_path, f"{folder}/images/validation/a.jpg", f"{folder}/annotations/validation/a.png", {1: 0})
    with pytest.raises(ValueError, match=r"lies twice below .*: give one of them"):
        open_dataset("ade20k-150", tmp_path)
    assert len(open_dataset("ade20k-150", tmp_path / "ade")) == 1


def test_a_link_to_the_same_place_is_no_second_place(tmp_path: Path) -> None:
    write_case(tmp_path, f"ade/{ADE}/images/validation/a.jpg", f"ade/{ADE}/annotations/validation/a.png", {1: 0})
    os.symlink(tmp_path / "ade" / ADE, tmp_path / ADE)
    assert len(open_dataset("ade20k-150", tmp_path)) == 1


def test_mmsegmentations_labels_beside_the_originals(tmp_path: Path) -> None:
    base = "coco_stuff164k/annotations/val2017"
    write_case(tmp_path, "coco_stuff164k/images/val2017/a.jpg", f"{base}/a.png", {181: 170})
    write_labels(tmp_path / base / "a_labelTrainIds.png", np.full((3, 1), 170))
    converted, raw = (open_dataset("coco-stuff", tmp_path, layout=one) for one in ("mmsegmentation", "original"))
    assert len(converted) == len(raw) == 1
    np.testing.assert_array_equal(converted[0].labels, raw[0].labels)


def test_voc_2010_is_not_taken_for_voc_2012(tmp_path: Path) -> None:
    write_case(tmp_path, f"{CONTEXT}/JPEGImages/a.jpg", f"{CONTEXT}/SegmentationClass/a.png", {1: 0})
    (tmp_path / CONTEXT / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / CONTEXT / "ImageSets/Segmentation/val.txt").write_text("a\n")
    for root in (tmp_path, tmp_path / CONTEXT):
        with pytest.raises(ValueError, match="no val part of voc-20"):
            open_dataset("voc-20", root)


def test_names_and_splits(tmp_path: Path) -> None:
    write_case(tmp_path, PICTURE, LABELS, {0: 0, 19: 19})
    plain, prompted = open_dataset("voc-20", tmp_path), open_dataset("voc-20", tmp_path, names="prompted")
    assert (plain.names, prompted.names) == ("plain", "prompted")
    assert plain.class_names[0] == ("aeroplane",)
    assert prompted.class_names[0] == ("aeroplane", "airplane", "aeroplanes", "airplanes")
    assert plain.unseen == prompted.unseen == (15, 16, 17, 18, 19)
    assert plain.seen == tuple(range(15))
    own = tmp_path / "own.txt"
    own.write_text("\n".join(f"thing {i}" for i in range(20)))
    dataset = open_dataset("voc-20", tmp_path, names=own)
    assert (dataset.names, dataset.class_names[3]) == (str(own), ("thing 3",))
    own.write_text("thing\n")
    with pytest.raises(ValueError, match="names 1 classes, voc-20 has 20"):
        open_dataset("voc-20", tmp_path, names=own)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs(mode: str, tmp_path: Path) -> None:
    write_case(tmp_path, PICTURE, LABELS, {0: 0, 1: 1, 19: 19})
    write_picture(tmp_path / PICTURE, (3, 3), mode)
    item = open_dataset("voc-20", tmp_path)[0]
    assert read_picture(item.picture).shape == (*item.labels.shape, 3)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20)])
def test_labels_of_a_turned_picture_lie_on_it(shape: tuple[int, int], tmp_path: Path) -> None:
    """Drawn on the picture as it is shown, 20x8, or as it is stored."""
    write_picture(tmp_path / PICTURE, (8, 20), orientation=6)
    write_labels(tmp_path / LABELS, np.zeros(shape))
    item = open_dataset("voc-20", tmp_path)[0]
    assert item.labels.shape == read_picture(item.picture).shape[:2] == (20, 8)


def test_files_that_cannot_be_used_are_named_when_they_are_read(tmp_path: Path) -> None:
    write_case(tmp_path, PICTURE, LABELS, {0: 0, 1: 1, 19: 19})
    dataset = open_dataset("voc-20", tmp_path)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            dataset[0]
        assert LABELS in str(error.value) or PICTURE in str(error.value)

    write_labels(tmp_path / LABELS, np.full((3, 3), 20))
    refused(r"the values \[20\] stand for no class; there are 20 classes, 0 to 19")
    write_labels(tmp_path / LABELS, np.zeros((4, 3)))
    refused("is 4x3 .*, its picture .* 3x3")
    whole = (tmp_path / PICTURE).read_bytes()
    (tmp_path / PICTURE).write_bytes(b"")
    write_labels(tmp_path / LABELS, np.zeros((3, 3)))
    refused("can't be read as a picture")
    (tmp_path / PICTURE).write_bytes(whole)
    (tmp_path / LABELS).write_bytes((tmp_path / LABELS).read_bytes()[:40])
    refused("can't be read as a label map")
    (tmp_path / LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=r"a.png"):
        dataset[0]
    with pytest.raises(IndexError):
        dataset[1]


def test_eight_bits_cannot_hold_847_classes(tmp_path: Path) -> None:
    labels = f"{FULL}/annotations_detectron2/validation/a.tif"
    write_case(tmp_path, f"{FULL}/images_detectron2/validation/a.jpg", labels, {0: 0})
    Image.fromarray(np.zeros((3, 1), np.uint8)).save(tmp_path / labels)
    with pytest.raises(ValueError, match="has 8 bits, its values go up to 846"):
        open_dataset("ade20k-847", tmp_path)[0]


def test_a_label_without_a_picture_and_a_picture_without_a_label(tmp_path: Path) -> None:
    write_case(tmp_path, f"{ADE}/images/validation/a.jpg", f"{ADE}/annotations/validation/a.png", {1: 0})
    write_picture(tmp_path / ADE / "images/validation/b.jpg", (3, 3))
    with pytest.warns(UserWarning, match=r"1 pictures of .* have no label file and are left out, such as b"):
        dataset = open_dataset("ade20k-150", tmp_path)
    assert isinstance(dataset, FileDataset)
    assert ([item.name for item in dataset], dataset.unlabelled) == (["a.jpg"], ("b",))
    (tmp_path / ADE / "images/validation/a.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 label files of .* have no picture in .*, such as a:"):
        open_dataset("ade20k-150", tmp_path)


def test_pictures_that_voc_has_for_other_tasks_are_no_fault(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write_case(tmp_path, PICTURE, LABELS, {0: 0, 19: 19})
    write_picture(tmp_path / VOC / "JPEGImages/other.jpg", (3, 3))
    assert len(open_dataset("voc-20", tmp_path)) == 1
    assert not recwarn.list


def test_listed_name_without_a_label(tmp_path: Path) -> None:
    write_case(tmp_path, PICTURE, f"{VOC}/SegmentationClass/a.png", {1: 0}, VOC_LIST)
    (tmp_path / VOC_LIST).write_text("a\nb\nc\n")
    with pytest.raises(ValueError, match=r"2 names of .*val.txt have no label file in .*, such as b"):
        open_dataset("voc-20", tmp_path)


def test_any_folder(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("3:cat,kitten\n9:dog\n")
    rows = np.array([[3, 9, 255]])
    for name, suffix in (("a", "webp"), ("b", "png"), ("c", "JPG")):
        write_picture(tmp_path / f"images/{name}.{suffix}", rows.shape)
        write_labels(tmp_path / f"labels/{name}.png", rows)
    dataset = open_dataset("folder", tmp_path)
    assert [item.name for item in dataset] == ["a.webp", "b.png", "c.JPG"]
    assert all(item.labels.tolist() == [[0, 1, 255]] for item in dataset)
    assert (dataset.class_names, dataset.names) == ((("cat", "kitten"), ("dog",)), str(tmp_path / "classes.txt"))
    assert dataset.unseen == ()
    write_labels(tmp_path / "labels/a.png", rows + 1)
    with pytest.raises(ValueError, match=r"a.png: the values \[0, 4, 10\] stand for no class"):
        dataset[0]
    write_picture(tmp_path / "images/b.jpg", rows.shape)
    with pytest.raises(ValueError, match="two files are named b"):
        open_dataset("folder", tmp_path)


def test_any_folder_with_splits_and_names_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('["cat", "dog"]')
    for split in ("train", "val"):
        write_picture(tmp_path / f"images/{split}/{split}.jpg", (2, 2))
        write_labels(tmp_path / f"labels/{split}/{split}.png", np.ones((2, 2)))
    for split in ("train", "val"):
        dataset = open_dataset("folder", tmp_path, split, names=tmp_path / "names.json")
        assert [item.name for item in dataset] == [f"{split}.jpg"]
    with pytest.raises(FileNotFoundError, match=r"classes.txt does not exist: .* needs a file of class names"):
        open_dataset("folder", tmp_path)


def test_the_embedded_world() -> None:
    for split, first, count in (("val", 8_000_000, 200), ("train", 9_000_000, 480)):
        dataset = open_dataset("shapes:3", split=split)
        assert len(dataset) == count
        scene = render_scene((first, 3, 7))
        np.testing.assert_array_equal(dataset[7].picture, scene.image)
        np.testing.assert_array_equal(dataset[7].labels, scene.labels)
        assert first not in (train_clip.TRAIN, train_clip.VALIDATION)
    assert [dataset.class_names[k][0] for k in dataset.unseen] == [*UNSEEN]
    names = {open_dataset("shapes", split=split)[i].name for split in ("train", "val") for i in (0, 1, -1)}
    assert len(names) == 6
    with pytest.raises(IndexError):
        dataset[480]


def test_worlds_of_other_words() -> None:
    of = {name: open_dataset(name) for name in ("shapes", "shapes-a", "shapes-b", "shapes-nouns")}
    words = {name: {word for (one,) in dataset.class_names for word in one.split()} for name, dataset in of.items()}
    assert {name: len(dataset.class_names) for name, dataset in of.items()} == {
        "shapes": 40, "shapes-a": 21, "shapes-b": 19, "shapes-nouns": 11,
    }  # fmt: skip
    colors = {"red", "yellow", "green", "blue", "purple", "pale", "dark"}
    assert words["shapes-a"] & words["shapes-b"] == colors
    assert words["shapes-nouns"] == words["shapes"] - colors
    assert not (of["shapes-a"].unseen or of["shapes-b"].unseen or of["shapes-nouns"].unseen)
    for name, dataset in of.items():
        seen = set(np.unique([dataset[i].labels for i in range(40)]).tolist())
        assert seen <= set(range(len(dataset.class_names))) and len(seen) > len(dataset.class_names) / 2, name
    # the same drawing under both vocabularies
    scene = render_scene((46_000_000, 0, 3))
    nouns = np.array([of["shapes-nouns"].class_names.index((name.split()[1],)) for name in CLASSES])
    np.testing.assert_array_equal(of["shapes-nouns"][3].labels, nouns[scene.labels])


@pytest.mark.parametrize(
    ("name", "root", "options", "error", "message"),
    [
        ("cityscapes", ".", {}, ValueError, "unknown data set 'cityscapes': expected one of voc-20,.*shapes"),
        ("voc-20:1", ".", {}, ValueError, "unknown data set 'voc-20:1'"),
        ("shapes:one", None, {}, ValueError, "the seed must be a number"),
        ("voc-20", ".", {"split": "test"}, ValueError, "split must be 'train' or 'val', got 'test'"),
        ("voc-20", None, {}, ValueError, "voc-20 needs root"),
        ("voc-20", "nowhere", {}, NotADirectoryError, "nowhere is no folder"),
        ("voc-20", ".", {}, ValueError, "no val part of voc-20 below .*there is none: `maft-adapter data check`"),
    ],
)
def test_refusals(
    name: str, root: str | None, options: dict[str, str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        open_dataset(name, None if root is None else tmp_path / root, **options)


def test_workers_can_have_it(tmp_path: Path) -> None:
    write_case(tmp_path, PICTURE, LABELS, {0: 0, 19: 19})
    for dataset in (open_dataset("voc-20", tmp_path), open_dataset("shapes")):
        copy: SegmentationDataset = pickle.loads(pickle.dumps(dataset))
        np.testing.assert_array_equal(copy[0].labels, dataset[0].labels)


def test_mess(tmp_path: Path) -> None:
    pytest.importorskip("mess", reason="mess-benchmark is not installed")
    base = tmp_path / "FloodNet-Supervised_v1.0"
    write_case(base, "images_detectron2/test/a.jpg", "annotations_detectron2/test/a.png", {0: 0, 9: 9, 255: None})
    dataset = open_dataset("mess:floodnet_sem_seg_test", tmp_path)
    assert dataset[0].labels.tolist() == [[0, 9, 255]] * 3
    assert (dataset.class_names[9], dataset.names) == (("grass",), "MESS")
    with pytest.raises(ValueError, match=r"unknown data set mess:nothing: expected one of floodnet_sem_seg_test,"):
        open_dataset("mess:nothing", tmp_path)
    with pytest.raises(ValueError, match="split must be 'val'"):
        open_dataset("mess:floodnet_sem_seg_test", tmp_path, "train")
    with pytest.raises(NotADirectoryError, match=r"SUIM.* is no folder"):
        open_dataset("mess:suim_sem_seg_test", tmp_path)


@pytest.mark.parametrize("data", ["shapes", "shapes-nouns:3", "mess:atlantis"])
def test_options_that_a_data_set_has_no_use_for_are_refused(data: str) -> None:
    with pytest.raises(ValueError, match=f"{data} has one list of names"):
        open_dataset(data, "there", names="prompted")
    with pytest.raises(ValueError, match="leave names and layout out"):
        open_dataset(data, "there", layout="original")
