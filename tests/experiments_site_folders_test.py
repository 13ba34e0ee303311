"""The files of a site's folder: what they keep, and which are refused."""

import pytest

from experiments import site_folders
from experiments.site_folders import Limits, Own


def test_a_journal_keeps_whole_lines(tmp_path):
  site_folders.note(tmp_path, "init")
  with (tmp_path / "journal.jsonl").open("a") as file:
    file.write('{"did": "half')
  site_folders.note(tmp_path, "round", round=3)
  assert [one["did"] for one in site_folders.notes(tmp_path)] == ["init", "round"]
  (tmp_path / "journal.jsonl").write_text("7\n")
  with pytest.raises(ValueError, match=r"journal\.jsonl is damaged"):
    site_folders.notes(tmp_path)


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("number = ", "is not TOML"),
    ("number = 0", "lacks 'name'"),
    ('number = "0"\nname = "a"', "give an integer and a text"),
    ('number = 0\nname = "a"\nnote = 3', "has .*note"),
    ('number = 0\nname = "a"\n[data]\nfolder = "x"', "folder='x' is not a setting of a site"),
    ('number = 0\nname = "a"\n[data]\ndata = 3', "data=3 must be of type str"),
    ('number = 0\nname = "a"\n[limits]\nfewest_sites = true', "fewest_sites=True must be of type"),
    ('number = 0\nname = "a"\n[limits]\nmax_rounds = -1', "max_rounds=-1"),
    ('number = 0\nname = "a"\n[limits]\nleaves = "images"', "leaves=.*images"),
  ],
)
def test_a_wrong_site_toml_is_refused(tmp_path, text, said):
  (tmp_path / "site.toml").write_text(text)
  with pytest.raises(ValueError, match=said):
    site_folders.read(tmp_path)


def test_site_toml_keeps_any_text(tmp_path):
  own = Own('folder:/a "b"\\c/ü\x7f\n', patient_pattern=r"(person\d+)_", skip_bad_files=True)
  member = site_folders.Member(3, "x", own, Limits(max_epsilon=2.5))
  site_folders.write(tmp_path, member)
  assert site_folders.read(tmp_path) == member
