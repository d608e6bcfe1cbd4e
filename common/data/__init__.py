"""Episodes on disk in LIBERO's HDF5 layout, which LIBERO's own loader and robomimic read.

    from common.data import read_episodes, write_episodes

`layout` says what a file holds and what an `Episode` is; `check` finds what departs from it, `understand` what can be made of that all
the same; `read`, `write` and `recorder` do what they are called. `vla` draws samples for a VLA from such files.
`python -m common.data FILE ...` sums files up, says what is wrong with them, and mends what can be mended.
"""

from common.data.check import check_file, require_sound
from common.data.layout import PROPRIO, Episode
from common.data.read import image_names, read_attrs, read_episodes
from common.data.recorder import Recorder
from common.data.write import replace_images, write_episodes

__all__ = [
    "PROPRIO",
    "Episode",
    "Recorder",
    "check_file",
    "image_names",
    "read_attrs",
    "read_episodes",
    "replace_images",
    "require_sound",
    "write_episodes",
]
