"""What `maft-adapter demo` shows of its measurements: the table, the curves and the report page.

All of it is made from what metrics.json holds, see `maft_adapter.shapes.demo.run_demo`.
"""

from __future__ import annotations

import base64
import statistics
from typing import Any

import numpy as np

from ..extras import extra
from .scenes import CLASSES, SEEN, UNSEEN

with extra("demo"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

TITLES = {
    "frozen_mask_crop": "frozen CLIP, mask & crop",
    "ip_clip": "IP-CLIP, no fine-tuning",
    "ip_clip_ma": "IP-CLIP + L_ma",
    "ip_clip_ma_dis": "IP-CLIP + L_ma + L_dis",
}
# Table 4(a): COCO-Stuff with FreeSeg; mIoU seen, mIoU unseen, hIoU, GFLOPs of the image encoder.
PAPER = {
    "frozen_mask_crop": (22.3, 29.3, 25.3, 1127.0),
    "ip_clip": (29.4, 36.2, 32.4, 53.4),
    "ip_clip_ma": (39.9, 47.1, 43.1, 53.4),
    "ip_clip_ma_dis": (40.1, 49.7, 44.4, 53.4),
}
SCORES = {"miou_seen": "seen", "miou_unseen": "unseen", "hiou": "hIoU"}  # keys of metrics.json and their headings
LOSS_TERMS = ("mask_aware", "self_distillation")
QUICK = "This was a quick run: few scenes and few iterations, too few for the order of the rows to mean anything."

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.7rem; line-height: 1.2 }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; font-weight: 400 }
thead th { font-weight: 600 }
th:first-child { text-align: left }
th[colspan] { text-align: center }
tbody tr { border-top: 1px solid #ddd }
tbody tr:last-child { background: #eef6f0 }
.paper { color: #666 }
:not(.paper) + .paper { border-left: 1px solid #ddd }
img { display: block; max-width: 100%; height: auto; margin: 1rem auto }
.scroll { overflow-x: auto }
.note { color: #555; font-size: .92rem }
"""


def curves_figure(result: dict[str, Any]) -> Figure:
    """Both losses, and mIoU over the iterations (Table 4c): means of the seeds so far, each seed faintly."""
    styles = {"ip_clip_ma": "--", "ip_clip_ma_dis": "-"}
    labels = {"ip_clip_ma": "L_ma only", "ip_clip_ma_dis": "L_ma + L_dis"}
    colors = {
        "mask_aware": "#333333",
        "self_distillation": "#333333",
        "miou_seen": "#0072B2",
        "miou_unseen": "#D55E00",
    }
    figure = Figure(figsize=(11.2, 3.3), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])
    titles = ("mask-aware loss L_ma", "self-distillation loss L_dis", "mIoU on the evaluation scenes, %")

    def draw(cell: Axes, runs: list[dict[str, Any]], key: str, name: str, label: str) -> None:
        values = np.array([_smooth(run[key]) if key in LOSS_TERMS else run[key] for run in runs])  # (seeds, points)
        x = runs[0].get("iterations", range(1, values.shape[1] + 1))
        if len(runs) > 1:
            cell.plot(x, values.T, styles[name], color=colors[key], lw=0.7, alpha=0.3)
        cell.plot(x, values.mean(0), styles[name], color=colors[key], lw=1.9, label=label)

    for name in labels:
        history = [run for run in result["history"] if run["name"] == name]
        curves = [run for run in result["curves"] if run["name"] == name]
        draw(panels[0], history, "mask_aware", name, labels[name])
        if name == "ip_clip_ma_dis":
            draw(panels[1], history, "self_distillation", name, labels[name])
        for key in ("miou_seen", "miou_unseen"):
            draw(panels[2], curves, key, name, f"{SCORES[key]}, {labels[name]}")
    for cell, title in zip(panels, titles, strict=True):
        cell.set_title(title, fontsize=11)
        cell.set_xlabel("iterations", fontsize=10)
        cell.xaxis.set_major_locator(MaxNLocator(integer=True))
        cell.tick_params(labelsize=9)
        cell.grid(color="#e3e3e3", lw=0.6)
        cell.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=9, frameon=False)
    panels[2].legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def table(result: dict[str, Any]) -> str:
    """The rows beside the paper's, as aligned text."""
    several = len(result["seeds"]) > 1
    wide = 12 if several else 7

    def line(title: str, ours: list[str], macs: str, ms: str, paper: list[str]) -> str:
        scores = "".join(cell.rjust(wide) for cell in ours)
        return f"{title:<25}{scores}{macs:>8}{ms:>10}  " + "".join(cell.rjust(8) for cell in paper)

    headings = list(SCORES.values())
    lines = [
        f"{'':<25}{'embedded world':^{3 * wide + 18}}  {'paper: COCO-Stuff, FreeSeg':^32}",
        line("", headings, "GMACs", "ms/image", [*headings, "GFLOPs"]),
    ]
    for row in result["rows"]:
        ours = [_score(row, key, several) for key in SCORES]
        macs, ms = f"{row['gmacs']:.3f}", f"{1000 * row['seconds_per_image']:.0f}"
        lines.append(line(TITLES[row["name"]], ours, macs, ms, [f"{x:.1f}" for x in PAPER[row["name"]]]))
    lines.append("mIoU of seen and unseen classes and their harmonic mean hIoU in %" + _spread(result))
    if result["quick"]:
        lines.append(QUICK)
    return "\n".join(lines)


def report_page(result: dict[str, Any], figures: dict[str, bytes]) -> str:
    """The report as one HTML page that needs no other file.

    Args:
        result: what `run_demo` returns, all four rows of at least one seed.
        figures: PNG files under "figure1", "label_maps" and "curves".
    """
    recipe, several = result["recipe"], len(result["seeds"]) > 1
    rows = {row["name"]: row for row in result["rows"]}
    first, last = rows["frozen_mask_crop"], rows["ip_clip_ma_dis"]
    seeds = ", ".join(str(numbers["seed"]) for numbers in last["per_seed"])
    ours = "".join(f"<th>{heading}</th>" for heading in SCORES.values())
    body = "".join(
        f"<tr><th>{TITLES[name].replace('&', '&amp;')}</th>"
        + "".join(f"<td>{_score(row, key, several)}</td>" for key in SCORES)
        + f"<td>{row['gmacs']:.3f}</td><td>{1000 * row['seconds_per_image']:.0f}</td>"
        + "".join(f'<td class="paper">{value:.1f}</td>' for value in PAPER[name])
        + "</tr>\n"
        for name, row in rows.items()
    )
    image = {
        name: f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in figures.items()
    }
    curve = next(run for run in result["curves"] if run["name"] == "ip_clip_ma_dis")
    seen, unseen = (f"{curve[key][0]:.1f} to {curve[key][-1]:.1f}" for key in ("miou_seen", "miou_unseen"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>maft-adapter: Table 4(a) on the embedded world</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Mask-aware CLIP: the paper's Table 4(a) on the embedded world</h1>
<p>Four ways to classify the same mask proposals with the same small CLIP, on {recipe["eval_scenes"]} held-out
scenes a seed (seeds: {seeds}). From the first row to the last, hIoU goes from {first["hiou"]:.1f} to
{last["hiou"]:.1f}, and the mIoU of unseen classes, whose masks and names the fine-tuning does not know, from
{first["miou_unseen"]:.1f} to {last["miou_unseen"]:.1f}. {QUICK if result["quick"] else ""}</p>

<h2>Table</h2>
<div class="scroll"><table>
<thead>
<tr><th></th><th colspan="5">embedded world</th><th colspan="4" class="paper">paper, Table 4(a)</th></tr>
<tr><th></th>{ours}<th>GMACs</th><th>ms/image</th>
<th class="paper">seen</th><th class="paper">unseen</th><th class="paper">hIoU</th>
<th class="paper">GFLOPs</th></tr>
</thead>
<tbody>
{body}</tbody>
</table></div>
<p class="note">mIoU of seen and unseen classes and their harmonic mean hIoU, in %{_spread(result)}.
Multiply-accumulates (attention included) and median time of the image encoder for all proposals of an image.
The paper's numbers are those of COCO-Stuff with FreeSeg; its GFLOPs leave attention out.</p>

<h2>Figure 1: one image, three proposals</h2>
{image["figure1"]}
<p class="note">Each row is a proposal of the same image, outlined in green, with its five best classes of all
{len(CLASSES)} under the frozen and under the fine-tuned CLIP. Green bars and bold names are what the proposal
contains; * marks unseen classes. Scene and proposals are chosen by the ground truth alone, not by what a
model says.</p>

<h2>Label maps</h2>
{image["label_maps"]}
<p class="note">The first evaluation scenes that show an unseen class (*): the image, the ground truth, and
what three of the rows make of the same proposals. Colours hold within a row.</p>

<h2>Losses, and mIoU over the iterations (Table 4c)</h2>
{image["curves"]}
<p class="note">Left and middle: the losses, running means over 10 iterations. Right: both fine-tunings,
followed on the evaluation scenes; with L_ma + L_dis (seed {curve["seed"]}) {recipe["iterations"]} iterations
bring seen classes from {seen} and unseen ones from {unseen}. In the paper unseen classes are best early and
fall while seen ones go on rising; L_dis is there to slow that fall. The number of iterations is part of the
recipe and was not chosen on these scenes.</p>

<h2>Recipe</h2>
<p>L = {recipe["start_layer"]} of 12 blocks; {recipe["iterations"]} iterations of AdamW with learning rate
{recipe["lr"]:g} and {recipe["batch_size"]} images each, from {recipe["train_scenes"]} scenes; SmoothL1, &lambda; =
{recipe["distillation_weight"]:g}; MLPs, patch convolution, class and position embedding frozen. {len(SEEN)}
classes are seen, {len(UNSEEN)} unseen: combinations of two words that both occur in seen classes. The
fine-tuning knows names and masks of seen classes only. The whole run took {result["seconds"]:.0f} s.</p>

<h2>What differs from the paper</h2>
<ul>
<li>The data: drawn scenes of 96&times;96 pixels and a CLIP of 12 blocks but only 64 channels, trained on
captions of such scenes, instead of COCO-Stuff and ViT-B/16 at 480&times;480.</li>
<li>The start layer is {recipe["start_layer"]}; the paper's is 8 of 12. In so small a tower the patches mix
within a few blocks, and a late start loses the region.</li>
<li>The learning rate is {recipe["lr"]:g} and the weights move {recipe["iterations"]} times; the paper has 1e-5 and 1000
(COCO-Stuff). So small a tower needs larger steps.</li>
<li>The proposals are superpixels merged into regions, made from pixels alone. The paper's come from a trained
generator, whose scores then join the ensemble of Eq. 9; here the scores are CLIP's alone, as in the paper's
Table 2. Many of the regions are fragments. Every row is evaluated with all of them; the fine-tuning sees only
those that stand out from their surroundings (contrast {recipe["min_contrast"]:g} and more), since fragments
teach it to deny whatever they are part of.</li>
<li>Sub-images of mask &amp; crop have 64&times;64 pixels, the small CLIP's native size, so their cost
compares otherwise than 224&times;224 with 480&times;480.</li>
</ul>
</body>
</html>
"""


def _score(row: dict[str, Any], key: str, several: bool) -> str:
    return f"{row[key]:.1f} ± {row['std'][key]:.1f}" if several else f"{row[key]:.1f}"


def _spread(result: dict[str, Any]) -> str:
    seeds = {len(row["per_seed"]) for row in result["rows"]}
    count = " to ".join(str(n) for n in sorted(seeds))
    return f"; mean ± sample standard deviation over {count} seeds" if len(result["seeds"]) > 1 else ""


def _smooth(values: list[float], window: int = 10) -> list[float]:
    """Mean of the last `window` values."""
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
