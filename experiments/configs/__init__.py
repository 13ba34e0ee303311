"""The settings of a training run, and how each becomes functions of the library.

Each record has a `build`, which calls the library's own constructors. What the library refuses is
not checked here a second time. `rehearse` builds everything before any image is read.
"""

from .run import Train, rehearse

__all__ = ["Train", "rehearse"]
