from __future__ import annotations

from importlib import metadata

import pytest

from trainfleet.doctor import versions
from trainfleet.doctor.versions import Requirement, check_copies, check_versions


@pytest.mark.parametrize(
    ("text", "version", "admits"),
    [
        ("numpy>=1.26", "1.26.0", True),
        ("numpy>=1.26", "1.3", False),
        ('torch>=2.11; extra == "torch"', "2.11.0+cpu", True),
        ('torch>=2.11; extra == "torch"', "2.9.1", False),
        ("protobuf (<6,>=4.21)", "6.0", False),
        ("protobuf (<6,>=4.21)", "5.29", True),
        ("hub!=0.30.0,>=0.24", "0.30", False),
        ("anything", "0", True),
        ("x==2.*", "3", True),
    ],
)
def test_bounds_are_compared_number_by_number(text, version, admits):
    assert Requirement.parse(text).admits(version) is admits


def test_names_extras_and_markers_are_read():
    mpi = Requirement.parse("mpich>=5; sys_platform != 'win32' and extra == 'mpi'")
    assert (mpi.name, mpi.extra, str(mpi)) == ("mpich", "mpi", "mpich>=5") and "win32" in mpi.marker
    assert Requirement.parse("uvicorn[standard]>=0.3").name == "uvicorn"


def planted(monkeypatch, needs: dict[str, list[str]], there: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(metadata, "requires", lambda name: needs.get(name, []))
    monkeypatch.setattr(metadata, "version", version)


def test_versions_below_the_bounds_are_named_with_the_command(monkeypatch):
    needs = {"trainfleet": ["numpy>=1.26", "pydantic>=2.11", 'tensorboard>=2.18; extra == "monitor"', "psutil>=6"]}
    planted(monkeypatch, needs, {"trainfleet": "0.1", "numpy": "1.20", "tensorboard": "2.1", "psutil": "6"})
    numpy, pydantic, tensorboard = check_versions()
    assert numpy.fact == "numpy is 1.20, and trainfleet 0.1 needs numpy>=1.26" and numpy.verdict == "no"
    assert numpy.remedy == 'pip install -U "numpy>=1.26"'
    assert pydantic.fact == "pydantic is missing, which trainfleet needs"
    assert "for its extra monitor" in tensorboard.fact and tensorboard.remedy == 'pip install -U "trainfleet[monitor]"'


def test_packages_that_disagree_with_each_other_are_named(monkeypatch):
    needs = {"trainfleet": ["numpy>=1.26", 'torch>=2; extra == "torch"'], "torch": ["numpy<2", 'x>9; extra == "y"']}
    planted(monkeypatch, needs, {"trainfleet": "0.1", "numpy": "2.4", "torch": "2.13", "x": "1"})
    (found,) = check_versions()
    assert found.verdict == "note" and found.fact == "torch 2.13 needs numpy<2, but 2.4 is installed"
    (found,) = check_versions(quick=True)
    assert found.verdict == "ok"


def test_a_trainfleet_that_is_only_imported_is_told(monkeypatch):
    planted(monkeypatch, {}, {})
    (found,) = check_versions()
    assert found.verdict == "note" and "not installed" in found.fact


def test_two_copies_are_named_and_one_reached_by_two_ways_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "_installed_in", lambda: iter(()))
    for name in ("a", "b"):
        (tmp_path / name / "numpy").mkdir(parents=True)
        (tmp_path / name / "numpy" / "__init__.py").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert list(check_copies([str(tmp_path / "a"), str(tmp_path / "link")])) == []
    (found,) = check_copies([str(tmp_path / "a"), str(tmp_path / "b")])
    assert f"{tmp_path}/a/numpy wins over {tmp_path}/b/numpy" in found.fact and "PYTHONPATH" in found.remedy
