"""Studies: parts that are run once and kept, settings that may not change meanwhile, a report at the end."""

import dataclasses
import json
import re
import sys
import typing
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

import modeling_hope.eval.studies
from modeling_hope.cli import study as command
from modeling_hope.cli.field_flags import scalar, setting
from modeling_hope.cli.main import main
from modeling_hope.eval.studies.study import Report, SeededSettings, Study
from modeling_hope.training.options import option


@strict
@dataclasses.dataclass
class SquareSettings(SeededSettings):
    numbers: list[int] = option(lambda: [2, 3, 4], "squares", "to be squared")


LISTED = list(command.STUDIES)
ran = []


def square(settings, number, seed):
    def part(place):
        assert place.is_dir()
        ran.append((number, seed))
        if number == 0:
            raise ValueError("`numbers`: 0 has no square here. Leave it out.")
        if number < 0:
            (place / "begun").write_text("half")
            raise KeyboardInterrupt
        return {"square": number**2, "seed": seed, "nothing": float("nan")}

    return part


STUDY = Study(
    name="squares",
    about="Squares of numbers.",
    settings=SquareSettings,
    quick={"numbers": [2]},
    parts=lambda settings: {
        f"{n}/seed-{seed}": square(settings, n, seed) for n in settings.numbers for seed in settings.seeds
    },
    report=lambda settings, found: Report(
        tables=f"| {sum(result['square'] for result in found.values())} |",
        figures={"parts": dict(found)},
        plot=lambda path: path.write_bytes(b"drawn"),
    ),
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    ran.clear()
    monkeypatch.setitem(command.STUDIES, "squares", "squares of numbers")
    monkeypatch.setitem(sys.modules, "modeling_hope.eval.studies.squares", SimpleNamespace(STUDY=STUDY))


def test_a_study_runs_each_part_once_and_reports_all(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["study", "squares", "--out", str(out), "--only", "2/*", "3/seed-0"]) == 0
    assert ran == [(2, 0), (2, 1), (3, 0)] and not (out / "squares.json").exists()
    assert "3 of 6 parts are there" in capsys.readouterr().out
    assert main(["study", "squares", "--out", str(out)]) == 0
    assert ran == [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]
    figures = json.loads((out / "squares.json").read_text())
    assert figures["settings"]["seeds"] == [0, 1] and figures["parts"]["3/seed-1"]["square"] == 9
    assert figures["parts"]["3/seed-1"]["nothing"] is None and figures["command"].startswith("hope study squares --out")
    assert "| 58 |" in (out / "squares.md").read_text() and "Seeds 0, 1." in capsys.readouterr().out
    assert (out / "squares.png").read_bytes() == b"drawn"


def test_a_study_that_was_stopped_goes_on(tmp_path):
    flags = ["study", "squares", "--out", str(tmp_path), "--numbers", "2", "-1", "4", "--seeds", "0"]
    assert main(flags) == 130 and ran == [(2, 0), (-1, 0)]
    assert main(flags) == 130 and ran[2:] == [(-1, 0)]


def test_the_quick_form_has_its_own_place_and_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "squares", "--quick"]) == 0 and ran == [(2, 0), (2, 1)]
    assert "measures nothing" in (tmp_path / "studies" / "squares-quick" / "squares.md").read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--numbers", "5"], "`numbers`: the study in .* was begun with"),
        (["--only", "9/*"], "`only`: no part is called '9/"),
        (["--seeds", "a"], "seeds"),
        (["--number", "5"], "--number"),
    ],
)
def test_what_cannot_be_is_refused_before_a_part_is_run(tmp_path, capsys, flags, said):
    assert main(["study", "squares", "--out", str(tmp_path), "--only", "2/seed-0"]) == 0
    ran.clear()
    capsys.readouterr()
    try:
        code = main(["study", "squares", "--out", str(tmp_path), *flags])
    except SystemExit as error:
        code = error.code
    assert code == 2 and not ran
    assert re.search(said, capsys.readouterr().err)


def test_settings_that_are_not_there_or_have_another_type_are_refused():
    with pytest.raises(ValueError, match="`numbr` is no setting of the study 'squares'"):
        STUDY.settle({"numbr": [1]})
    with pytest.raises(StrictDataclassError, match="numbers"):
        STUDY.settle({"numbers": "many"})
    with pytest.raises(ValueError, match="`seeds` is empty: give at least one"):
        STUDY.settle({"seeds": []})


def test_every_study_is_listed():
    directory = Path(next(iter(modeling_hope.eval.studies.__path__)))
    found = [path.stem for path in directory.glob("*.py") if "\nSTUDY = Study(" in path.read_text()]
    assert sorted(LISTED) == sorted(found)


@pytest.mark.parametrize("name", LISTED)
def test_types_of_every_studys_settings_are_checked(name):
    study = import_module(f"modeling_hope.eval.studies.{name}").STUDY
    assert study.name == name and study.settle({"quick": True}).quick
    for field in dataclasses.fields(study.settings):
        wrong = {} if field.type in (str, str | None) else "x"
        with pytest.raises(StrictDataclassError, match=field.name):
            study.settle({"quick": True, field.name: wrong})
        if int in (field.type, *typing.get_args(field.type)):
            for value in (True, 2.5):
                with pytest.raises(StrictDataclassError, match=field.name):
                    study.settle({"quick": True, field.name: [value] if field.type == list[int] else value})


def test_settings_whose_types_are_text_are_refused():
    text = dataclasses.make_dataclass(
        "Text", [("number", "int", option(1, "study", "of things"))], bases=(SeededSettings,)
    )
    with pytest.raises(TypeError, match="Text has types that are text"):
        dataclasses.replace(STUDY, settings=text).settle({})


def test_numbers_are_written_as_in_python(tmp_path):
    for text, value in (("1e-4", 1e-4), ("3E2", 300.0), ("-.5e+1", -5.0), ("7", 7), ("0.1", 0.1), ("none", None)):
        assert scalar(text) == value and type(scalar(text)) is type(value)
    assert setting("rate=1e-3") == ("rate", 1e-3) and setting("rates=[1e-1, 2]") == ("rates", [0.1, 2])
    assert setting("name=1e-4x") == ("name", "1e-4x") and setting("name='1e-4'") == ("name", "1e-4")


def test_whole_numbers_are_floats_where_those_are_declared():
    @strict
    @dataclasses.dataclass
    class RateSettings(SeededSettings):
        rate: float | None = option(None, "study", "", above=0)
        rates: list[float] = option(lambda: [0.1], "study", "", least=0)

    study = dataclasses.replace(STUDY, settings=RateSettings, quick={})
    settings = study.settle({"rate": 2, "rates": [1, 0.5]})
    assert (type(settings.rate), settings.rates, type(settings.rates[0])) == (float, [1.0, 0.5], float)
    for given, said in (
        ({"rate": 0}, "`rate` must be above 0, got 0.0"),
        ({"rate": float("nan")}, "`rate` must be above 0, got nan"),
        ({"rates": [0.1, -1]}, "`rates` must be 0 or more, got -1.0"),
        ({"rates": [float("inf")]}, "`rates` must be 0 or more, got inf"),
        ({"rates": []}, "`rates` is empty"),
    ):
        with pytest.raises(ValueError, match=said):
            study.settle(given)


def test_a_start_that_failed_does_not_refuse_the_command_that_is_right(tmp_path, capsys):
    flags = ["study", "squares", "--out", str(tmp_path), "--seeds", "0", "--numbers"]
    assert main([*flags, "0"]) == 2 and "0 has no square" in capsys.readouterr().err
    assert main([*flags, "-1"]) == 130  # and leaves a file to go on from
    assert main([*flags, "3"]) == 2 and "`numbers`: the study" in capsys.readouterr().err
    (tmp_path / "parts" / "-1" / "seed-0" / "begun").unlink()
    assert main([*flags, "3"]) == 0
