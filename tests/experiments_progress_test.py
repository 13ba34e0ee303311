"""Where nobody sees a bar move, progress is a few plain lines."""

from experiments import progress


def lines_of(capsys, at, monkeypatch):
  """What an arm of 100 rounds prints whose rounds end at the given times."""
  bar = progress.Lines(desc="pooled", initial=0, total=100, unit="round", bar_format="{bar}")
  for number, now in enumerate(at, 1):
    monkeypatch.setattr(progress.time, "monotonic", lambda now=now: now)
    bar.set_postfix_str(f"loss {number}", refresh=False)
    bar.update()
  bar.close()
  return capsys.readouterr().err.splitlines()


def test_a_line_of_the_first_round_then_one_every_ten_seconds_and_of_the_last(capsys, monkeypatch):
  said = lines_of(capsys, [100 + 0.5 * i for i in range(64)], monkeypatch)
  assert said == [f"pooled: round {n} of 100  loss {n}" for n in (1, 21, 41, 61, 64)]


def test_long_rounds_have_a_line_each(capsys, monkeypatch):
  said = lines_of(capsys, [0, 60, 120], monkeypatch)
  assert said == [f"pooled: round {n} of 100  loss {n}" for n in (1, 2, 3)]


def test_steps_have_the_names_of_what_is_at_work(capsys, monkeypatch):
  bar = progress.Lines(total=3, bar_format="{bar}")
  for now, phase in enumerate(("deal", "online         conv1", "online")):
    monkeypatch.setattr(progress.time, "monotonic", lambda now=now: 100 + 11 * now)
    bar.set_description_str(phase)
    bar.update()
  said = capsys.readouterr().err.splitlines()
  assert said == ["deal: step 1 of 3", "online conv1: step 2 of 3", "online: step 3 of 3"]


def test_a_silent_process_prints_nothing(capsys):
  bar = progress.Lines(desc="pooled", initial=3, total=4, disable=True)
  bar.write("round 4: aborted")
  bar.set_postfix_str("stopped")
  bar.update()
  bar.close()
  assert capsys.readouterr().err == ""
