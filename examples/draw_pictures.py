"""Draw the scenes in examples/pictures: `python examples/draw_pictures.py`."""

from pathlib import Path

from PIL import Image

from maft_adapter.shapes import render_scene

if __name__ == "__main__":
    folder = Path(__file__).parent / "pictures"
    folder.mkdir(exist_ok=True)
    for seed in (0, 2, 5, 6, 10, 20):
        Image.fromarray(render_scene(seed, size=384).image).save(folder / f"scene-{seed:02d}.png", optimize=True)
