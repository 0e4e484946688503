"""The app, in a real browser without a network: what a person does with it, and what it keeps to itself."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from maft_adapter import cli
from maft_adapter.baselines import encode_crops
from maft_adapter.classify import class_scores, text_classifier
from maft_adapter.models import Model, load_model
from maft_adapter.pictures import Segmentation, Segmenter
from maft_adapter.shapes import load_clip, preprocess, render_scene

pytest.importorskip("gradio", reason='gradio is not installed: pip install "maft-adapter[app]"')
from maft_adapter.app import region_at, words_of

playwright = pytest.importorskip("playwright.sync_api", reason='playwright is not installed: pip install ".[test]"')
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
PATIENCE = 60_000  # ms, of a busy machine


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model()


def segmented(model: Model, picture: Any) -> Segmentation:
    names = model.class_names or ()
    return Segmenter(model.clip, model.tokenizer, names, templates=model.templates, size=model.size)(picture)


@pytest.fixture(scope="module")
def samples(model: Model) -> list[Segmentation]:
    """The first two of the page's samples."""
    pictures = [render_scene((7_000_000, k), size=256, things=(2, 4), radius=(0.16, 0.28)).image for k in (8, 17)]
    return [segmented(model, picture) for picture in pictures]


def expected(model: Model, result: Segmentation, mask: NDArray[Any]) -> dict[str, list[str]]:
    """The five best classes before and after, best first."""
    text = text_classifier(model.clip, model.tokenizer, result.names, model.templates)
    crops, _ = encode_crops(load_clip(), preprocess(result.picture)[None], torch.from_numpy(mask)[None, None])
    before = class_scores(crops[0], text, model.logit_scale)[0].topk(5).indices.tolist()
    return {
        "before": [result.names[k] for k in before],
        "after": [name for name, _ in result.ask(mask[None]).top(5)[0]],
    }


@pytest.mark.parametrize("typed", ["", " \n", "ball,", "ball,,box", ", ball"])
def test_words_that_are_missing(typed: str) -> None:
    with pytest.raises(ValueError, match="a word is missing: type words with commas"):
        words_of(typed)


def test_words_of_lines_and_commas() -> None:
    assert words_of(" red ball,pale sand\nblue box ") == ["red ball", "pale sand", "blue box"]


def test_the_region_at_a_pixel(samples: list[Segmentation]) -> None:
    result = samples[0]
    for x, y in np.random.default_rng(0).integers(256, size=(20, 2)).tolist():
        label = result.label_map[y, x]
        covering = [n for n in range(len(result.masks)) if result.masks[n, y, x] and result.valid[n]]
        loudest = max(covering, key=lambda n: result.scores[n, label])
        assert (region_at(result, x, y) == result.masks[loudest]).all()


def test_a_pixel_without_a_region(samples: list[Segmentation]) -> None:
    corner = np.zeros((1, 256, 256), bool)
    corner[0, :64, :64] = True
    result = samples[0].ask(corner)
    assert region_at(result, 10, 10).sum() == 64 * 64
    with pytest.raises(ValueError, match="no proposal covers this place: draw a box around it"):
        region_at(result, 100, 100)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--port", "0"], 2, "--port 0: expected 1 to 65535"),
        (["--port", "70000"], 2, "--port 70000: expected 1 to 65535"),
        (["--pretrained", "openai"], 1, "without a model"),
        (["--checkpoint", "no-such-file.pth"], 1, "no-such-file.pth"),
        (["--proposals", "magic"], 1, "proposals are 'magic'; expected superpixels"),
        (["--device", "abacus"], 1, "device 'abacus' can't be used here"),
    ],
)
def test_what_is_refused(arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert cli.main(["app", *arguments]) == status
    except SystemExit as error:  # argparse's
        assert error.code == status
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, str]]:
    """The process of `maft-adapter app` and the address that it prints."""
    command = [sys.executable, "-m", "maft_adapter", "app"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found
    yield process.pid, found[0]
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        # pixi, which the brush draws with, needs WebGL, here in software.
        options = ["--no-sandbox", "--enable-unsafe-swiftshader"]
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def visit(server: tuple[int, str], browser: Any) -> Iterator[Any]:
    """`visit()`: the page in a browser of its own, when its first picture is there."""
    contexts, outside = [], list[str]()

    def new() -> Any:
        context = browser.new_context(viewport={"width": 1280, "height": 1000})
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("request", lambda request: outside.append(request.url))
        page.goto(server[1])
        page.locator("#labelled img").wait_for()
        return page

    yield new
    for context in contexts:
        context.close()
    local = (server[1], "data:", "blob:")
    assert [url for url in outside if not url.startswith(local)] == []


def click(page: Any, x: int, y: int, size: tuple[int, int]) -> None:
    """On a pixel of the picture, which has `size` (W, H); shown in the middle, never enlarged."""
    image = page.locator("#picture img")
    box, whole = image.bounding_box(), image.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    scale = min(box["width"] / whole[0], box["height"] / whole[1], 1)
    places = zip(("width", "height"), (x, y), size, whole, strict=True)
    across, down = ((box[side] - n * scale) / 2 + (at + 0.5) / of * n * scale for side, at, of, n in places)
    image.click(position={"x": across, "y": down})


def says(page: Any, answers: dict[str, list[str]]) -> None:
    for where, names in answers.items():
        playwright.expect(page.locator(f"#{where} dt")).to_have_text(names, timeout=PATIENCE)


def message(page: Any, text: str) -> None:
    playwright.expect(page.get_by_test_id("toast-body").last).to_contain_text(text, timeout=PATIENCE)


@needs_chromium
def test_a_visit(visit: Any, model: Model, samples: list[Segmentation]) -> None:
    page = visit()
    first, second = samples
    click(page, 187, 154, (256, 256))
    says(page, expected(model, first, region_at(first, 187, 154)))

    page.locator("button.thumbnail-item").nth(1).click()
    playwright.expect(page.locator("#after dt")).to_have_count(0, timeout=PATIENCE)
    click(page, 180, 60, (256, 256))
    says(page, expected(model, second, region_at(second, 180, 60)))

    page.get_by_label("box").check()
    page.get_by_text("Click two opposite corners").wait_for()
    before = page.locator("#picture img").get_attribute("src")
    click(page, 240, 190, (256, 256))
    playwright.expect(page.locator("#picture img")).not_to_have_attribute("src", before, timeout=PATIENCE)
    click(page, 120, 20, (256, 256))
    box = np.zeros((256, 256), bool)
    box[20:191, 120:241] = True
    says(page, expected(model, second, box))

    words = page.locator("textarea")
    words.fill("red ball, blue ring, pale water")
    page.get_by_role("button", name="Use these words").click()
    few = second.relabel(["red ball", "blue ring", "pale water"])
    says(page, {"after": [name for name, _ in few.ask(box[None]).top(3)[0]]})

    words.fill("red ball, unicorn")
    page.get_by_role("button", name="Use these words").click()
    message(page, "unicorn")
    says(page, {"after": [name for name, _ in few.ask(box[None]).top(3)[0]]})


@needs_chromium
def test_the_brush(visit: Any) -> None:
    page = visit()
    page.get_by_label("brush").check()
    page.get_by_text("Layer 1").wait_for()
    playwright.expect(page.get_by_text(re.compile(r"^1\d\d%$"))).to_be_visible(timeout=PATIENCE)  # fitted in
    canvas = page.locator("canvas").first.bounding_box()
    x, y = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y + 30, steps=5)
    page.mouse.up()
    playwright.expect(page.locator("#after dt")).to_have_count(5, timeout=PATIENCE)
    playwright.expect(page.locator("#before dt")).to_have_count(5, timeout=PATIENCE)


@needs_chromium
def test_ones_own_pictures(visit: Any, model: Model, samples: list[Segmentation], tmp_path: Path) -> None:
    page, other = visit(), visit()
    upload = page.locator("input[type=file]")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    upload.set_input_files(broken)
    message(page, "broken.png is no picture of a format that PIL knows")
    assert str(tmp_path) not in page.content()
    click(page, 187, 154, (256, 256))  # the picture before is still there
    says(page, expected(model, samples[0], region_at(samples[0], 187, 154)))

    mine = render_scene(21, size=160).image[:80]  # (80, 160, 3)
    Image.fromarray(mine).save(tmp_path / "mine.png")
    upload.set_input_files(tmp_path / "mine.png")
    playwright.expect(page.locator("#after dt")).to_have_count(0, timeout=PATIENCE)
    click(page, 40, 60, (160, 80))
    result = segmented(model, mine)
    says(page, expected(model, result, region_at(result, 40, 60)))

    click(other, 180, 60, (256, 256))  # another's browser has its own picture
    says(other, expected(model, samples[0], region_at(samples[0], 180, 60)))


@needs_chromium
def test_this_machine_alone_is_listened_to(visit: Any, server: tuple[int, str]) -> None:
    psutil = pytest.importorskip("psutil")
    visit()
    process = psutil.Process(server[0])
    connections = [c for each in (process, *process.children(recursive=True)) for c in each.net_connections()]
    assert {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    assert cli.main(["app", "--port", server[1].rstrip("/").rpartition(":")[2]]) == 1  # it is taken
