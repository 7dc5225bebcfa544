"""What is installed is what lies in the tree."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_packaged():
    found = {"mmalign"} | {
        f"mmalign.{path.parent.relative_to(ROOT / 'mmalign').as_posix().replace('/', '.')}"
        for path in (ROOT / "mmalign").rglob("*/__init__.py")
    }
    for folder in ("pipelines", "rewardmodels"):
        inside = [path for path in (ROOT / folder).rglob("*.py") if path.parent != ROOT / folder]
        assert not inside, f"{folder}/ is kept flat, or pyproject.toml must list its folders: {inside}"
        found.add(f"mmalign.{folder}")
    assert found == set(SETUP["tool"]["setuptools"]["packages"])


@pytest.mark.slow
def test_the_wheel_holds_one_name_and_every_module_imports_from_it(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    if subprocess.run(
        [sys.executable, "-c", "import setuptools"], capture_output=True, check=False
    ).returncode:
        build.remove("--no-build-isolation")
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"mmalign"}
    shipped = {path.name for path in (ROOT / "pipelines/models").glob("*.json")}
    assert {path.name for path in (site / "mmalign/pipelines/models").iterdir()} == shipped
    modules = sorted(
        ".".join(path.relative_to(site).with_suffix("").parts).removesuffix(".__init__")
        for path in (site / "mmalign").rglob("*.py")
        if path.name != "__main__.py"  # is the command itself
    )
    assert "mmalign.pipelines.sd3" in modules
    assert "mmalign.rewardmodels.jpeg" in modules
    elsewhere = tmp_path / "empty"
    elsewhere.mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        f"for name in {modules!r}: __import__(name)\n"
        "import mmalign; print(mmalign.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=elsewhere, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().startswith(str(site))
