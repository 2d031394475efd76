"""What ships is what is checked: the packages that setup.cfg lists, and mypy's files."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

from places import ROOT


def settings() -> ConfigParser:
    found = ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def folders() -> set[Path]:
    """Return the folders of the packages that are installed."""
    options = settings()["options"]
    lines = [line.partition("=") for line in options["package_dir"].splitlines() if line]
    elsewhere = {package.strip(): folder.strip() for package, _, folder in lines}
    names = options["packages"].split()
    return {ROOT / elsewhere.get(name, name.replace(".", "/")) for name in names}


def test_every_package_is_installed() -> None:
    made = {file.parent for top in ("fedgfe_store", "cli") for file in (ROOT / top).rglob("*.py")}
    assert made == folders()


def test_mypy_checks_whatever_is_installed() -> None:
    checked = [ROOT / name for name in settings()["mypy"]["files"].split(", ")]
    assert all(folder.is_dir() for folder in checked)
    assert not [f for f in folders() if not any(f.is_relative_to(each) for each in checked)]
