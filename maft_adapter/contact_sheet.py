"""A page that shows many pictures at a glance, to be filtered by what is in them."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote

__all__ = ["Entry", "contact_sheet"]


class Entry(NamedTuple):
    """One picture of a contact sheet.

    Attributes:
        image: its path as seen from the page, with slashes, or a `data:` URL.
        title: below it, such as the file's name.
        labels: what the page can be filtered by.
        note: a line of text below the title.
        links: text -> path of further files, as seen from the page.
    """

    image: str
    title: str
    labels: Sequence[str] = ()
    note: str = ""
    links: Mapping[str, str] = {}


def contact_sheet(entries: Iterable[Entry], title: str) -> str:
    """A page of HTML that needs nothing but the pictures it shows: no network, and no scripts besides its own.

    Every label is a button with the number of its pictures; chosen ones leave the pictures that have all of them.
    Without JavaScript, all are shown.

    Args:
        entries: the pictures, in order.
        title: of the page.

    Example:
        >>> page = contact_sheet([Entry("a b.jpg", "<a & b>", ["swan"])], "Pictures")
        >>> 'src="a%20b.jpg"' in page, "&lt;a &amp; b&gt;" in page
        (True, True)
    """
    entries = list(entries)
    counts = Counter(label for entry in entries for label in dict.fromkeys(entry.labels))
    buttons = "\n".join(
        f'<button aria-pressed="false" data-label="{html.escape(label)}">{html.escape(label)} <i>{count}</i></button>'
        for label, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
    return _PAGE.format(
        title=html.escape(title), count=len(entries), buttons=buttons, figures="\n".join(map(_figure, entries))
    )


def _figure(entry: Entry) -> str:
    links = " ".join(f'<a href="{_url(path)}">{html.escape(text)}</a>' for text, path in entry.links.items())
    labels = html.escape(json.dumps(list(entry.labels), ensure_ascii=False))
    return (
        f'<figure data-labels="{labels}"><a href="{_url(entry.image)}"><img loading="lazy" src="{_url(entry.image)}" '
        f'alt="{html.escape(entry.title)}"></a><figcaption><b>{html.escape(entry.title)}</b> {links}'
        f"<br>{html.escape(entry.note)}</figcaption></figure>"
    )


def _url(path: str) -> str:
    return html.escape(path if path.startswith("data:") else quote(path, errors="surrogateescape"))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fff }}
h1 {{ font-size: 1.3rem; margin: 0 0 .8rem }}
nav {{ max-height: 9.5rem; overflow-y: auto; margin-bottom: 1.2rem }}
button {{ font: inherit; margin: 0 .3rem .4rem 0; padding: .15rem .6rem; border: 1px solid #bbb; border-radius: 1rem;
  background: #f4f4f4; cursor: pointer }}
button[aria-pressed=true] {{ background: #117733; border-color: #117733; color: #fff }}
i {{ opacity: .6; font-style: normal; font-size: .85em }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.2rem; align-items: start }}
figure {{ margin: 0; overflow-wrap: anywhere }}
figure[hidden] {{ display: none }}
img {{ width: 100%; display: block; border: 1px solid #ddd }}
figcaption {{ margin-top: .3rem; font-size: .9rem }}
</style>
</head>
<body>
<h1>{title} (<span id="shown">{count}</span> of {count})</h1>
<nav>
{buttons}
</nav>
<main>
{figures}
</main>
<script>
const buttons = [...document.querySelectorAll("button")], figures = [...document.querySelectorAll("figure")];
for (const button of buttons) button.onclick = () => {{
  button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") === "false");
  const chosen = buttons.filter(b => b.getAttribute("aria-pressed") === "true").map(b => b.dataset.label);
  for (const figure of figures) {{
    const labels = JSON.parse(figure.dataset.labels);
    figure.hidden = !chosen.every(label => labels.includes(label));
  }}
  document.getElementById("shown").textContent = figures.filter(figure => !figure.hidden).length;
}};
</script>
</body>
</html>
"""
