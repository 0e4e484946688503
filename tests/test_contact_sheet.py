"""The contact sheet: what its HTML holds, and that it needs nothing from elsewhere."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from maft_adapter.contact_sheet import Entry, contact_sheet

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<b>\"swan\" & 'river'</b></script>"


class Page(HTMLParser):
    """Tags with their attributes, text outside scripts and styles, and whether every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_names_are_escaped_and_paths_quoted() -> None:
    entry = Entry("sub/a #1 50%?.jpg", NASTY, [NASTY, "sky"], NASTY, {NASTY: "ä.json"})
    page = Page(contact_sheet([entry], NASTY))
    assert page.open == []
    (image,), (figure,) = page.all("img"), page.all("figure")
    assert image["src"] == "sub/a%20%231%2050%25%3F.jpg" and image["alt"] == NASTY
    assert json.loads(figure["data-labels"] or "") == [NASTY, "sky"]
    assert [button["data-label"] for button in page.all("button")] == [NASTY, "sky"]
    assert unquote(page.all("a")[1]["href"] or "") == "ä.json"
    assert page.text.count(NASTY) == 6  # head, h1, button, link, title, note
    assert not page.all("b")[1:]  # none of the names became a tag


def test_one_button_a_label_the_most_frequent_first() -> None:
    labels = [["sky", "swan"], ["swan", "swan"], [], ["river", "swan", "sky"]]
    page = Page(contact_sheet([Entry(f"{i}.jpg", str(i), found) for i, found in enumerate(labels)], "P"))
    assert [button["data-label"] for button in page.all("button")] == ["swan", "sky", "river"]
    assert "swan 3" in page.text and "4 of 4" in page.text


def test_nothing_comes_from_elsewhere() -> None:
    page = Page(contact_sheet([Entry("data:image/png;base64,AAAA", "a")], "P"))
    urls = [attributes[key] for _, attributes in page.tags for key in ("src", "href") if key in attributes]
    assert urls == ["data:image/png;base64,AAAA"] * 2
    assert not page.all("link")


def test_no_pictures() -> None:
    assert "0 of 0" in Page(contact_sheet([], "P")).text


def test_names_that_are_no_utf_8() -> None:
    name = b"caf\xe9.jpg".decode(errors="surrogateescape")
    page = contact_sheet([Entry(name, name)], "P")
    assert Page(page).all("img")[0]["src"] == "caf%E9.jpg"  # the bytes of the name
    page.encode(errors="replace")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(
    ("clicked", "shown"),
    [
        ([], ["one", "two", "three"]),
        (["swan"], ["one", "two"]),
        (["swan", 'a "quoted" <b>&</b>'], ["two"]),
        (["swan", "swan"], ["one", "two", "three"]),
        (["swan", "river"], []),
    ],
)
def test_the_page_filters_in_a_browser(clicked: list[str], shown: list[str], tmp_path: Path) -> None:
    entries = [
        Entry("1.jpg", "one", ["swan"]),
        Entry("2.jpg", "two", ["swan", 'a "quoted" <b>&</b>']),
        Entry("3.jpg", "three", ["river"]),
    ]
    clicks = f"for (const label of {json.dumps(clicked)}) buttons.find(b => b.dataset.label === label).click();"
    page = contact_sheet(entries, "Pictures").replace("</body>", f"<script>{clicks}</script></body>")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    browser = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=60
    )
    figures = re.findall(r"<figure([^>]*)>.*?<b>(.*?)</b>", browser.stdout, flags=re.DOTALL)
    assert [title for attributes, title in figures if " hidden" not in attributes] == shown
    assert f'<span id="shown">{len(shown)}</span>' in browser.stdout
