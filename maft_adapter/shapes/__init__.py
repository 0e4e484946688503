"""The embedded world: everything can be shown and tested offline, in minutes.

- `scenes`: drawn pictures of coloured things on textured stuff, with exact label maps and captions. A class
  is two words, "red star" or "pale sand"; the unseen classes are combinations whose two words both occur in
  seen classes.
- `clip`: a small CLIP, an ordinary open_clip model, with shipped weights.
- `train_clip`: how those weights were made, from image-level captions alone.
- `demo`: the paper's Table 4(a), `maft-adapter demo`.

Example:
    >>> len(CLASSES), len(SEEN), len(UNSEEN)
    (40, 32, 8)
    >>> scene = render_scene(0)
    >>> {CLASSES[k] for k in scene.present} <= {*SEEN, *UNSEEN}
    True
"""

from .clip import load_clip, preprocess, tokenize
from .scenes import CLASSES, SEEN, UNSEEN, Scene, render_scene

__all__ = ["CLASSES", "SEEN", "UNSEEN", "Scene", "load_clip", "preprocess", "render_scene", "tokenize"]
