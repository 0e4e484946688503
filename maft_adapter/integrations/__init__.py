"""Shims for segmentation systems built on detectron2: `zegformer`, `zsseg`, `freeseg`, `ovseg`, a package each.

They lie in the folder integrations/ of the repository and are installed beside this module.
"""

from pathlib import Path

_ROOT = Path(__file__).parents[2]
if (_ROOT / "setup.cfg").is_file():  # a checkout, also one installed with `pip install -e`
    __path__.append(str(_ROOT / "integrations"))
