"""Masks made elsewhere: files written by hand and by other libraries, and broken ones."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from maft_adapter.proposals import Files, Proposals, base, check_proposals, proposer
from maft_adapter.proposals.convert import from_rle

HEIGHT, WIDTH = 6, 9
PICTURE = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
MASKS = np.zeros((3, HEIGHT, WIDTH), bool)
MASKS[0, :2], MASKS[1, 3:, 4:], MASKS[2, 1, 1] = True, True, True
IDS = MASKS[0] * 1 + MASKS[1] * 7  # two masks that don't overlap


def rle(mask: NDArray[np.bool_], compressed: bool = True) -> dict[str, Any]:
    """Counted by hand, column by column; compressed by pycocotools."""
    counts, inside = [0], False
    for pixel in mask.T.ravel():
        if bool(pixel) != inside:
            counts.append(0)
            inside = not inside
        counts[-1] += 1
    code = {"size": list(mask.shape), "counts": counts}
    if not compressed:
        return code
    return {"size": list(mask.shape), "counts": coco.frPyObjects(code, *mask.shape)["counts"].decode()}


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def instances(masks: list[Any], file_name: str = "dog.jpg", **image: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 4, "file_name": file_name, "height": HEIGHT, "width": WIDTH, **image}],
        "annotations": [{"id": i, "image_id": 4, "category_id": 1, "segmentation": m} for i, m in enumerate(masks)],
        "categories": [{"id": 1, "name": "dog"}],
    }


def read(path: Path, name: str = "dog.jpg") -> Proposals:
    proposals = proposer(f"files:{path}")(PICTURE, name)
    check_proposals(proposals, (HEIGHT, WIDTH))
    return proposals


def test_records_of_sam(tmp_path: Path) -> None:
    records = [
        {"segmentation": rle(mask, i == 1), "predicted_iou": score, "bbox": [0, 0, 1, 1], "stability_score": 0.9}
        for i, (mask, score) in enumerate(zip(MASKS, (0.9, 1.02, 0.5), strict=True))
    ]
    write_json(tmp_path / "dog.json", records)
    write_json(tmp_path / "sa_1.json", {"image": {"image_id": 1, "file_name": "sa_1.jpg"}, "annotations": records})
    write_json(tmp_path / "nothing.json", [])
    for name in ("dog.jpg", "x/sa_1.jpg"):
        masks, scores, class_scores = read(tmp_path, name)
        assert np.array_equal(masks, MASKS) and class_scores is None
        assert scores is not None and np.array_equal(scores, np.array([0.9, 1.0, 0.5], np.float32))
    assert read(tmp_path / "dog.json").masks.shape == (3, HEIGHT, WIDTH)
    assert read(tmp_path, "nothing.png").masks.shape == (0, HEIGHT, WIDTH)


def test_instances_of_coco(tmp_path: Path) -> None:
    square = [[1.0, 1, 5, 1, 5, 4, 1, 4]]
    content = instances([rle(MASKS[0]), square, rle(MASKS[2], compressed=False), [*square, [6, 1, 9, 1, 9, 3]]])
    content["images"].append({"id": 5, "file_name": "empty.jpg", "height": HEIGHT, "width": WIDTH})
    path = write_json(tmp_path / "instances.json", content)
    masks, scores, _ = read(path)
    reference = COCO(str(path))
    expected = [reference.annToMask(annotation) for annotation in reference.loadAnns(reference.getAnnIds([4]))]
    assert np.array_equal(masks, expected) and scores is None
    assert masks[1].sum() == 12  # 4 x 3 pixels
    assert read(path, "empty.jpg").masks.shape == (0, HEIGHT, WIDTH)
    for i, annotation in enumerate(content["annotations"]):
        annotation["score"] = i / 4
    path = write_json(tmp_path / "dog.json", content)  # of one picture, in a folder
    assert np.array_equal(read(tmp_path).scores, np.arange(4, dtype=np.float32) / 4)  # type: ignore[arg-type]


def test_panoptic_of_coco(tmp_path: Path) -> None:
    big = 3 + 256 * 200 + 65536 * 17
    ids = np.where(MASKS[0], 5, 0) + np.where(MASKS[1], big, 0)
    Path(tmp_path, "panoptic").mkdir()
    png = tmp_path / "panoptic" / "dog.png"
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(png)
    content = instances([])
    segments = [{"id": big, "category_id": 1}, {"id": 5, "category_id": 1}]
    content["annotations"] = [{"image_id": 4, "file_name": "dog.png", "segments_info": segments}]
    path = write_json(tmp_path / "panoptic.json", content)
    assert np.array_equal(read(path).masks, MASKS[[1, 0]])

    content["annotations"].append({"image_id": 5, "segments_info": segments})
    write_json(path, content)
    with pytest.raises(ValueError, match=r"panoptic.json gives no masks: entry 1 of 'annotations' has no file_name"):
        Files(path)
    write_json(path, {**content, "annotations": content["annotations"][:1]})
    version = Files(path).version("dog.jpg")
    Image.new("RGB", (WIDTH, HEIGHT)).save(png)
    assert Files(path).version("dog.jpg") != version
    with pytest.raises(ValueError, match=rf"dog.png gives no masks: ids \[5, {big}\] are in the PNG or in the JSON"):
        read(path)
    Image.new("L", (WIDTH, HEIGHT)).save(png)
    with pytest.raises(ValueError, match="mode L, expected RGB"):
        read(path)
    png.unlink()
    with pytest.raises(ValueError, match=r"dog.png gives no masks"):
        read(path)
    png.parent.rmdir()
    with pytest.raises(ValueError, match=r"panoptic.json gives no masks: .* there is no folder .*panoptic$"):
        Files(path)


@pytest.mark.parametrize("kind", ["L", "P", "I;16", "1"])
def test_id_maps(kind: str, tmp_path: Path) -> None:
    ids = IDS.astype(np.uint8)
    if kind == "I;16":
        image = Image.fromarray(np.where(IDS == 7, 65535, IDS).astype(np.uint16))
    elif kind == "1":
        image = Image.fromarray(MASKS[0])
    else:
        image = Image.fromarray(np.where(ids == 7, 255, ids).astype(np.uint8))
        if kind == "P":
            image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(tmp_path / "dog.png")
    with Image.open(tmp_path / "dog.png") as saved:
        assert saved.mode == kind
    assert np.array_equal(read(tmp_path).masks, MASKS[: 1 if kind == "1" else 2])
    assert np.array_equal(read(tmp_path / "dog.png").masks, MASKS[: 1 if kind == "1" else 2])


def test_arrays(tmp_path: Path) -> None:
    soft = np.random.default_rng(0).random((3, HEIGHT, WIDTH))
    arrays = [MASKS, MASKS.astype(np.uint8), soft, IDS.astype(np.int16), MASKS[0]]
    expected = [MASKS, MASKS, soft.astype(np.float32), MASKS[:2], MASKS[:1]]
    for i, (array, masks) in enumerate(zip(arrays, expected, strict=True)):
        np.save(tmp_path / f"{i}.npy", array)
        np.savez(tmp_path / f"z{i}.npz", masks=array)
        for name in (f"{i}.jpg", f"z{i}.jpg"):
            found = read(tmp_path, name)
            assert np.array_equal(found.masks, masks) and found.scores is None
    probabilities = np.full((3, 4), 0.25)
    np.savez_compressed(tmp_path / "dog.npz", masks=MASKS, scores=[0.1, 0.2, 1], class_scores=probabilities)
    found = read(tmp_path)
    assert np.array_equal(found.scores, np.array([0.1, 0.2, 1], np.float32))  # type: ignore[arg-type]
    assert np.array_equal(found.class_scores, probabilities)  # type: ignore[arg-type]


def test_a_folder_of_pngs(tmp_path: Path) -> None:
    folder = tmp_path / "dog.v2"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"dog.v2 gives no masks: the folder holds no PNG; .* write \[\]"):
        read(tmp_path, "dog.v2.jpg")
    for i, (mask, name) in enumerate(zip(MASKS, ("2.png", "10.png", "9.PNG"), strict=True)):
        Image.fromarray(mask.astype(np.uint8) * (255 if i else 1)).save(folder / name)
    (folder / "metadata.csv").write_text("id,area\n")  # SAM's script writes one
    assert np.array_equal(read(tmp_path, "dog.v2.jpg").masks, MASKS[[0, 2, 1]])
    Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)).save(folder / "11.png")
    with pytest.raises(ValueError, match=r"dog.v2 gives no masks: 11.png has values \[0, 1, 2, 3\]"):
        read(tmp_path, "dog.v2.jpg")


def test_pictures_of_one_name_in_several_folders(tmp_path: Path) -> None:
    for folder, ids in {"": MASKS[0], "a": MASKS[1], "a/b": MASKS[2]}.items():
        (tmp_path / folder).mkdir(exist_ok=True)
        np.save(tmp_path / folder / "dog.npy", ids)
    for name, mask in {
        "dog.jpg": MASKS[0], "photos/dog.jpg": MASKS[0], "/data/a/dog.jpg": MASKS[1], "../a/b/dog.jpg": MASKS[2]
    }.items():  # fmt: skip
        assert np.array_equal(read(tmp_path, name).masks, mask[None]), name

    content = instances([rle(MASKS[0])], "a/dog.jpg")
    content["images"].append({**content["images"][0], "id": 5, "file_name": "b/dog.jpg"})
    content["annotations"].append({"image_id": 5, "segmentation": rle(MASKS[1])})
    path = write_json(tmp_path / "both.json", content)
    assert np.array_equal(read(path, "/data/a/dog.png").masks, MASKS[:1])
    assert np.array_equal(read(path, "b/dog.jpg").masks, MASKS[1:2])
    with pytest.raises(ValueError, match=r"several pictures 'dog.jpg': \['a/dog.jpg', 'b/dog.jpg'\]"):
        read(path, "dog.jpg")
    with pytest.raises(ValueError, match=r"both.json holds no picture 'c/dog.jpg'"):
        read(path, "c/dog.jpg")
    content["images"][1]["file_name"] = "a/dog.png"
    path = write_json(tmp_path / "both.json", content)
    assert np.array_equal(read(path, "dog.png").masks, MASKS[1:2])  # the same stem, told by what follows it


def test_missing_and_ambiguous_masks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder of masks"):
        Files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no masks of 'a/cat.jpg': no cat.json, cat.png, cat.npy, cat.npz and"):
        read(tmp_path, "a/cat.jpg")
    np.save(tmp_path / "dog.npy", MASKS)
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match=r"'dog.jpg' has several files of masks, keep one: .*dog.npy, .*dog$"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"dog.npy holds masks of 'dog' alone, none of 'cat.jpg'"):
        read(tmp_path / "dog.npy", "cat.jpg")
    with pytest.raises(ValueError, match="found by the picture's file name: give name="):
        Files(tmp_path)(PICTURE)
    (tmp_path / "dog.txt").write_text("")
    with pytest.raises(ValueError, match=r"dog.txt is not a folder, nor one of .json, .png, .npy, .npz"):
        Files(tmp_path / "dog.txt")


def test_masks_of_another_size(tmp_path: Path) -> None:
    turned = MASKS.transpose(0, 2, 1)
    write_json(tmp_path / "sam.json", [{"segmentation": rle(turned[0])}])
    write_json(tmp_path / "coco.json", instances([rle(turned[0])], "coco.jpg"))
    write_json(tmp_path / "polygon.json", instances([[[0, 0, 2, 0, 2, 2]]], "polygon.jpg", height=WIDTH, width=HEIGHT))
    Image.fromarray(turned[0]).save(tmp_path / "ids.png")
    np.save(tmp_path / "array.npy", turned)
    for stem in ("sam", "coco", "polygon", "ids", "array"):
        message = (
            rf"{stem}.\w+ gives no masks: .*9 x 6 \(height x width\), the picture 6 x 9, turned as its EXIF data say"
        )
        with pytest.raises(ValueError, match=message):
            read(tmp_path, f"{stem}.jpg")
    np.save(tmp_path / "dog.npy", MASKS[:, :4])
    with pytest.raises(ValueError, match=r"masks are 4 x 9 \(height x width\), the picture 6 x 9; resize the masks"):
        read(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 20, -1, -30])
@pytest.mark.parametrize("suffix", [".json", ".png", ".npy", ".npz"])
def test_cut_off_files_are_named(suffix: str, cut: int, tmp_path: Path) -> None:
    path = tmp_path / f"dog{suffix}"
    if suffix == ".json":
        write_json(path, [{"segmentation": rle(mask)} for mask in MASKS])
    elif suffix == ".png":
        Image.fromarray(IDS.astype(np.uint8)).save(path)
    elif suffix == ".npy":
        np.save(path, MASKS)
    else:
        np.savez_compressed(path, masks=MASKS)
    path.write_bytes(path.read_bytes()[:cut])
    if suffix == ".png" and cut == -1:
        return  # its last bytes are a checksum of nothing, which readers leave unread
    with pytest.raises(ValueError, match=rf"dog\{suffix} gives no masks: ."):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "expected a list of SAM's records"),
        ({"annotations": {}}, "expected a list of SAM's records"),
        ([3], "record 0 is 3, expected a dictionary with a 'segmentation'"),
        ([{"segmentation": None}], "record 0: segmentation is None, expected a list of polygons or a run-length code"),
        ([{"segmentation": rle(MASKS[0])}, {"segmentation": {"size": [6, 9], "counts": "0"}}], "record 1: code 0 is"),
        ([{"segmentation": {"size": [6], "counts": "0"}}], r"record 0: code 0 is of size \[6\], expected"),
        ([{"segmentation": [[1, 1, 3, 3]]}], "record 0: polygon .* at least three points"),
        ([{"segmentation": [[1, 1, 3, 3, float("nan"), 1]]}], "record 0: polygon .* at least three points"),
        ([{"segmentation": [["1", 1, 3, 3, 4, 5]]}], "record 0: polygon .* at least three points"),
        ([{"segmentation": []}], "record 0: segmentation is an empty list"),
        (
            [{"segmentation": rle(MASKS[0]), "predicted_iou": 1}, {"segmentation": rle(MASKS[0])}],
            "1 of 2 records have 'predicted_iou', expected all or none",
        ),
        ([{"segmentation": rle(MASKS[0]), "predicted_iou": "high"}], "'predicted_iou' must be a number"),
        ({"images": 3}, "no list 'images'"),
        ({"images": []}, "no list 'annotations'"),
        ({"images": [{"id": 4}], "annotations": []}, "entry 0 of 'images' has no file_name, height, width"),
        ({**instances([]), "annotations": [{"id": 1}]}, "entry 0 of 'annotations' has no image_id"),
        (instances([None]), "annotation 0 of 'dog.jpg': segmentation is None"),
        (
            {**instances([]), "annotations": [{"image_id": 4, "segmentation": rle(MASKS[0]), "score": 7}]},
            "scores must lie",
        ),
    ],
)  # fmt: skip
def test_damaged_json_is_named(content: Any, message: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "dog.json", content)
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match=rf"dog.json gives no masks: {message}"):
            read(place)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (MASKS * 255, r"an array \(3, 6, 9\) int64; expected masks \(N, H, W\)"),
        (MASKS[None], r"an array \(1, 3, 6, 9\) bool"),
        (np.array(["mask"]), "an array"),
        (IDS - 1, "id -1 is negative"),
        (
            np.full((1, HEIGHT, WIDTH), 3.0),
            r"masks must lie in \[0, 1\], got values from 3 to 3: logits need a sigmoid",
        ),
        (np.full((1, HEIGHT, WIDTH), np.nan), r"got values from nan to nan"),
        (np.array([MASKS, None], dtype=object), "allow_pickle"),
    ],
)
def test_arrays_that_are_no_masks_are_named(array: NDArray[Any], message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "dog.npy", array)
    with pytest.raises(ValueError, match=rf"dog.npy gives no masks: .*{message}"):
        read(tmp_path)


def test_other_damage_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "dog.npz", segments=MASKS)
    with pytest.raises(ValueError, match=r"dog.npz gives no masks: it holds segments, expected an array 'masks'"):
        read(tmp_path)
    np.savez(tmp_path / "dog.npz", masks=MASKS, scores=[1, 0])
    with pytest.raises(ValueError, match=r"dog.npz gives no masks: scores are \(2,\) for 3 masks"):
        read(tmp_path)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "cat.png")
    with pytest.raises(ValueError, match=r"cat.png gives no masks: a PNG of mode RGB, expected one grey channel"):
        read(tmp_path, "cat.jpg")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"text.png gives no masks: cannot identify"):
        read(tmp_path, "text.jpg")


def test_versions_tell_that_a_pictures_masks_changed_and_settings_the_path(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        np.save(tmp_path / f"{name}.npy", MASKS)
    path = write_json(tmp_path / "all.json", instances([rle(MASKS[0])]))

    def versions() -> list[str]:
        places = (tmp_path, "dog.jpg"), (tmp_path, "cat.jpg"), (tmp_path / "dog.npy", "dog.jpg"), (path, "dog.jpg")
        return [Files(place).version(name) for place, name in places]

    before, settings = versions(), Files(tmp_path).settings
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cat.npy").touch()
    assert versions() == before
    np.save(tmp_path / "dog.npy", MASKS[:2])
    write_json(path, instances([rle(MASKS[1])] * 2))
    assert [a == b for a, b in zip(before, versions(), strict=True)] == [False, True, False, False]
    assert Files(tmp_path).settings == settings != Files(path).settings
    for name, message in (("", "give name="), ("cow.jpg", "holds no masks of 'cow.jpg'")):
        with pytest.raises(ValueError, match=message):
            Files(tmp_path).version(name)


def test_masks_are_one_pictures(tmp_path: Path) -> None:
    np.save(tmp_path / "dog.npy", MASKS)
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b" / "dog.npy", MASKS[:1])
    write_json(tmp_path / "all.json", instances([rle(MASKS[0])]))
    for place, holder in (
        (tmp_path, "dog.npy"),
        (tmp_path / "dog.npy", "dog.npy"),
        (tmp_path / "all.json", "all.json"),
    ):
        files = Files(place)
        assert files.version("a/dog.jpg") == files.version("./a/dog.jpg")
        files(PICTURE, "a/dog.jpg")
        for other in ("c/dog.jpg", "a/dog.png"):
            message = rf"{holder} holds the masks of .*/a/dog.jpg, .* of '{other}', too"
            with pytest.raises(ValueError, match=message):
                files.version(other)
            with pytest.raises(ValueError, match=message):
                files(PICTURE, other)
    files = Files(tmp_path)
    assert [len(files(PICTURE, name).masks) for name in ("a/dog.jpg", "b/dog.jpg", "a/dog.jpg")] == [3, 1, 3]


def test_masks_that_memory_should_not_hold_are_refused_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = 300  # with 16-bit ids, 5.9 GB
    ids = np.arange(side * side).reshape(side, side) % 65536
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "ids.png")
    np.save(tmp_path / "array.npy", ids)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|b1", "fortran_order": False, "shape": (10**6, side, side)})
    (tmp_path / "promise.npy").write_bytes(header.getvalue())
    with zipfile.ZipFile(tmp_path / "packed.npz", "w") as file:
        file.writestr("masks.npy", header.getvalue())
    for stem, count in {"ids": 65535, "array": 65535, "promise": 10**6, "packed": 10**6}.items():
        message = rf"{stem}\.\w+ gives no masks: masks of {count} x 300 x 300 pixels are more than a picture may have"
        with pytest.raises(ValueError, match=message):
            Files(tmp_path)(np.zeros((side, side, 3), np.uint8), f"{stem}.jpg")

    monkeypatch.setattr(base, "MOST_PIXELS", 3 * HEIGHT * WIDTH - 1)
    write_json(tmp_path / "sam.json", [{"segmentation": rle(mask)} for mask in MASKS])
    write_json(tmp_path / "coco.json", instances([rle(mask) for mask in MASKS], "coco.jpg"))
    (tmp_path / "folder").mkdir()
    for i, mask in enumerate(MASKS):
        Image.fromarray(mask).save(tmp_path / "folder" / f"{i}.png")
    for name in ("sam", "coco", "folder"):
        with pytest.raises(ValueError, match=rf"{name}\S* gives no masks: masks of 3 x 6 x 9 pixels are more than"):
            read(tmp_path, f"{name}.jpg")
    with pytest.raises(ValueError, match="masks of 3 x 6 x 9 pixels are more than"):
        from_rle([rle(mask) for mask in MASKS])
    monkeypatch.setattr(base, "MOST_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(ValueError, match=r"masks of \d x 6 x 9 pixels are more than"):
        proposer("superpixels")(PICTURE)


def test_an_id_map_of_another_size_is_refused_before_its_masks_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "dog.npy", IDS.T)
    monkeypatch.setattr(base, "MOST_PIXELS", IDS.size)
    with pytest.raises(ValueError, match=r"masks are 9 x 6 .* the picture 6 x 9, turned"):
        read(tmp_path)


def test_annotations_of_no_picture_are_named(tmp_path: Path) -> None:
    content = instances([rle(MASKS[0])])
    content["annotations"].append({"image_id": "4", "segmentation": rle(MASKS[1])})  # a string, the image's is a number
    path = write_json(tmp_path / "all.json", content)
    with pytest.raises(ValueError, match=r"all.json gives no masks: annotations are of the picture with the id '4'"):
        Files(path)
