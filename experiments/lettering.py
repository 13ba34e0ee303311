"""Names of classes and data sets in pictures: any letters, and nothing read as a formula.

A picture takes a font of this machine that has all letters. Where there is none, a class has its
number, and other letters become question marks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text


def shown(names: Sequence[str]) -> list[str]:
  """The names of classes as pictures show them: as they are, or "class 2" where no font has the
  letters of the second.
  """
  has_font = lambda name: font_for(frozenset(name)) is not None
  return [name if has_font(name) else f"class {i}" for i, name in enumerate(names, 1)]


def numbered(names: Sequence[str]) -> str:
  """What the numbers of `shown` stand for; empty where pictures show the names."""
  pairs = zip(shown(names), names, strict=True)
  return "; ".join(f"{number} is {name}" for number, name in pairs if number != name)


def in_legend(name: str) -> str:
  """A label that a legend shows; one that begins with an underscore would be left out."""
  return f" {name}" if name.startswith("_") else name


def prepare(figure: Figure) -> None:
  """Makes all texts of a figure plain ones, in a font that has their letters."""
  for text in figure.findobj(Text):
    assert isinstance(text, Text)
    text.set_parse_math(False)  # a $ is a dollar
    said = text.get_text()
    family = font_for(frozenset(said))
    if family is None:
      text.set_text("".join(c if font_for(frozenset(c)) is not None else "?" for c in said))
    elif family:
      text.set(fontfamily=[*text.get_fontfamily(), family], fontweight="normal")


@functools.lru_cache(maxsize=1024)
def font_for(letters: frozenset[str]) -> str | None:
  """The family that has the letters which the default font lacks; empty where it lacks none, and
  None where no font has them.
  """
  default = font_manager.findfont(font_manager.FontProperties())
  needed = {ord(letter) for letter in letters if letter.isprintable()} - _letters(default)
  if not needed:
    return ""
  same = font_manager.get_font(default).family_name
  for font in font_manager.fontManager.ttflist:
    # The last resort has a box for every letter.
    is_other = font.name != same and "Last Resort" not in font.name and font.style == "normal"
    if is_other and needed <= _letters(font.fname):
      return font.name
  return None


@functools.cache
def _letters(path: str) -> frozenset[int]:
  return frozenset(font_manager.get_font(path).get_charmap())
