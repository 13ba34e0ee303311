"""Names that are formulas, markup or Chinese: in pictures, reports and tables as they are."""

import csv
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiments import lettering, markdown, plots, report

NAMES = ("cost $5 to $9", "_under_", "a^2_b{", r"\frac", "pipe|and`tick", "=1+1")
CHINESE = "肺炎"
LABELS = np.arange(12) % 6
PROBABILITIES = np.eye(6)[LABELS]


@pytest.fixture
def drawn(monkeypatch):
  """The texts of the pictures that are saved, which are drawn; a missing letter is an error."""
  texts = []

  def save(figure, path, **options):
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      figure.draw_without_rendering()
    texts.extend(figure.findobj(Text))

  monkeypatch.setattr(Figure, "savefig", save)
  return texts


@pytest.fixture
def without_fonts(monkeypatch):
  """A machine with the default font alone."""
  monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
  lettering.font_for.cache_clear()
  yield
  lettering.font_for.cache_clear()


def draw(names, title="Test: $x$ of _y_"):
  plots.confusion_matrix(np.eye(6, dtype=int), names, "unused", title)
  plots.roc(LABELS, PROBABILITIES, names, "unused", title)


def test_pictures_show_every_name_as_it_is(drawn):
  draw(NAMES)
  said = [text.get_text().replace("\n", "").strip() for text in drawn]
  assert not any(text.get_parse_math() for text in drawn if "$" in text.get_text())
  for name in NAMES:
    assert name in said
    assert f"{name}: 1.000" in said  # the legend, which leaves out what begins with _
  assert said.count("Test: $x$ of _y_") == 2


def test_letters_of_no_font_become_numbers_and_the_report_says_which(drawn, without_fonts):
  names = (*NAMES[:5], CHINESE)
  draw(names, f"Test: {CHINESE}")
  said = [text.get_text().replace("\n", "") for text in drawn]
  assert "class 6" in said
  assert "class 6: 1.000" in said
  assert "Test: ??" in said
  assert not any(CHINESE in text for text in said)
  assert lettering.numbered(names) == f"class 6 is {CHINESE}"
  assert lettering.numbered(NAMES) == ""


def test_a_font_of_the_machine_is_taken_where_one_has_the_letters(drawn):
  """A letter that matplotlib's own STIX has, and its default does not."""
  stix = next(f for f in font_manager.fontManager.ttflist if f.name == "STIXGeneral")
  default = font_manager.findfont(font_manager.FontProperties())
  letters = lettering._letters
  letter = next(
    chr(c) for c in sorted(letters(stix.fname) - letters(default)) if chr(c).isprintable()
  )
  names = (*NAMES[:5], f"{letter}x")
  assert lettering.shown(names) == list(names)
  draw(names)
  text = next(text for text in drawn if text.get_text() == f"{letter}x")
  family = text.get_fontfamily()[-1]
  assert ord(letter) in letters(font_manager.findfont(family))
  assert matplotlib.rcParams["font.family"] == ["sans-serif"]  # nothing global is changed


def test_the_report_shows_names_as_they_are(tmp_path, drawn):
  arms = {"federated": report.Arm(LABELS, PROBABILITIES)}
  report.write_report(
    tmp_path, title="Test", data_name="folder <b> of $x$", arms=arms, label_names=NAMES,
    facts=report.Facts({}),
  )  # fmt: skip
  text = (tmp_path / "report.md").read_text(encoding="utf-8")
  assert text.startswith("# Test: folder \\<b\\> of \\$x\\$\n")
  for shown in (
    r"cost \$5 to \$9", r"\_under\_", "a^2_b{", r"\\frac", r"pipe\|and\`tick", "=1+1"
  ):  # fmt: skip
    assert f"| sensitivity: {shown} (%) | 100.0 " in text
  assert markdown.plain("chest_xray_224.tar") == "chest_xray_224.tar"


def test_a_table_holds_no_formulas(tmp_path):
  path = tmp_path / "predictions.csv"
  ids = ["-1.png", "@cmd", "+2", "a-1.png"]
  report.predictions_csv(path, ids, LABELS[5:9], PROBABILITIES[5:9], NAMES)
  with path.open(newline="", encoding="utf-8") as file:
    head, *rows = csv.reader(file)
  assert [row[:3] for row in rows] == [
    ["'-1.png", "'=1+1", "'=1+1"],
    ["'@cmd", "cost $5 to $9", "cost $5 to $9"],
    ["'+2", "_under_", "_under_"],
    ["a-1.png", "a^2_b{", "a^2_b{"],
  ]
  assert not any(cell.startswith(("=", "+", "-", "@")) for row in (head, *rows) for cell in row)
