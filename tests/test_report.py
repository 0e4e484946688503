"""The table, the curves and the page of the demo, made from the numbers of a run that never was."""

import re
from typing import Any

import numpy as np
import pytest

from maft_adapter.shapes.report import PAPER, TITLES, curves_figure, report_page, table

NAMES = list(TITLES)
RECIPE = {
    "start_layer": 2, "iterations": 4, "lr": 0.001, "batch_size": 8, "distillation_weight": 0.25,
    "min_contrast": 0.5, "train_scenes": 30, "eval_scenes": 20, "curve_every": 2,
}  # fmt: skip


def result_of(seeds: list[int], quick: bool = False) -> dict[str, Any]:
    """What `run_demo` returns."""
    rng = np.random.default_rng(0)
    rows = []
    for name in NAMES:
        per_seed = [
            {"seed": seed, **{key: float(rng.uniform(10, 60)) for key in ("miou_seen", "miou_unseen", "hiou")}}
            for seed in seeds
        ]
        scores = {key: [numbers[key] for numbers in per_seed] for key in ("miou_seen", "miou_unseen", "hiou")}
        means = {key: float(np.mean(values)) for key, values in scores.items()}
        std = {key: float(np.std(values)) for key, values in scores.items()}
        row = {"name": name, **means, "std": std, "gmacs": 1.25, "seconds_per_image": 0.0617}
        rows.append({**row, "per_seed": per_seed})
    tuned = [(seed, name) for seed in seeds for name in NAMES[2:]]
    return {
        "rows": rows,
        "seeds": seeds,
        "seconds": 123.4,
        "quick": quick,
        "recipe": RECIPE,
        "history": [
            {
                "name": name,
                "seed": seed,
                "mask_aware": rng.random(4).tolist(),
                "self_distillation": [0.1, 0.2, 0.3, 0.4],
            }
            for seed, name in tuned
        ],
        "curves": [
            {
                "name": name,
                "seed": seed,
                "iterations": [0, 2, 4],
                "miou_seen": rng.uniform(0, 50, 3).tolist(),
                "miou_unseen": rng.uniform(0, 50, 3).tolist(),
            }
            for seed, name in tuned
        ],
    }


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_table_has_every_row_beside_the_papers(seeds: list[int]) -> None:
    result = result_of(seeds)
    lines = table(result).splitlines()
    assert len({len(line) for line in lines[1:6]}) == 1  # aligned
    for line, row in zip(lines[2:6], result["rows"], strict=True):
        numbers = [float(x) for x in re.findall(r"[\d.]+", line.removeprefix(TITLES[row["name"]]))]
        assert numbers[-4:] == list(PAPER[row["name"]])
        assert numbers[-6:-4] == [1.25, 62]
        ours = [[row[key], row["std"][key]][: len(seeds)] for key in ("miou_seen", "miou_unseen", "hiou")]
        assert numbers[:-6] == [round(value, 1) for cell in ours for value in cell]
    assert ("sample standard deviation over 2 seeds" in lines[-1]) == (len(seeds) == 2)


def test_a_quick_run_says_that_it_is_one() -> None:
    for quick in (False, True):
        result = result_of([0], quick)
        assert ("quick run" in table(result)) == quick
        assert ("quick run" in report_page(result, {"figure1": b"", "label_maps": b"", "curves": b""})) == quick


def test_page_needs_no_other_file_and_has_every_number() -> None:
    result = result_of([4, 9])
    page = report_page(result, {"figure1": b"one", "label_maps": b"two", "curves": b"three"})
    sources = re.findall(r'(?:src|href)="?([^">]*)', page)
    assert sources == [f"data:image/png;base64,{data}" for data in ("b25l", "dHdv", "dGhyZWU=")]
    assert "http" not in page and "url(" not in page and "@import" not in page
    for row in result["rows"]:
        for key in ("miou_seen", "miou_unseen", "hiou"):
            assert f"{row[key]:.1f} ± {row['std'][key]:.1f}" in page
    assert "seeds: 4, 9" in page and "0.25" in page and "4 iterations of AdamW" in page


def test_curves_show_the_mean_of_the_seeds() -> None:
    result = result_of([0, 1])
    panel = curves_figure(result).axes[2]
    lines = {line.get_label(): line for line in panel.lines}
    for label, name in (("L_ma only", "ip_clip_ma"), ("L_ma + L_dis", "ip_clip_ma_dis")):
        for heading, key in (("seen", "miou_seen"), ("unseen", "miou_unseen")):
            runs = [run[key] for run in result["curves"] if run["name"] == name]
            line = lines[f"{heading}, {label}"]
            points = np.asarray(line.get_xydata(), float)  # (3, 2)
            np.testing.assert_allclose(points.T, [[0, 2, 4], np.mean(runs, axis=0)])
