"""What others install: the wheel in an environment of its own, and the bundle that runs on it."""

import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from cafe_flwr import __version__
from cafe_flwr.app.manifest import main

ROOT = Path(__file__).resolve().parent.parent
SLIM = "pyproject-flwr.toml"


@pytest.fixture(scope="module")
def bundling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bundle", ROOT / "scripts" / "bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundle(bundling, tmp_path_factory) -> Path:
    """The bundle, unpacked."""
    folder = tmp_path_factory.mktemp("bundle")
    with zipfile.ZipFile(bundling.bundle(ROOT, folder)) as archive:
        archive.extractall(folder / "app")
    return folder / "app"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--installer", "uv", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Python of an environment in which the wheel is installed, and this environment's packages can be seen.

    A line in a .pth file adds a folder but does not read the .pth files in it: this checkout, installed as editable, is
    not seen.
    """
    folder = tmp_path_factory.mktemp("environment") / "env"
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--python", python, wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def output_of(python: Path, program: str, folder: Path, *arguments: object) -> str:
    """What a program prints that runs outside this checkout."""
    command = [python, "-I", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the two manifests -----------------------------------------------------------------------------------------------


def test_both_manifests_agree(bundling):
    """Settings, the range of Flower, components, versions."""
    assert bundling.disagreements(ROOT) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("num-server-rounds = 100", "num-server-rounds = 99", "settings differ: num-server-rounds;"),
        ("dirichlet-alpha", "alpha", "settings differ: dirichlet-alpha, alpha;"),
        ("flwr>=1.41", "flwr>=1.40", "depends on flwr<2.0,>=1.40, pyproject.toml on flwr<2.0,>=1.41"),
        (f"cafe-flwr=={__version__}", "cafe-flwr>=0", f"must depend on cafe-flwr=={__version__}"),
        ('"torch>=2.4",', '"torch>=2.4",\n"pytest>=8",', "depends on pytest>=8, pyproject.toml on pytest not at all"),
        ("client_app:app", "client_app:application", "[tool.flwr.app].components is"),
        (f'version = "{__version__}"', 'version = "9.9"', "[project].version is '9.9'"),
    ],
)
def test_a_manifest_that_says_something_else_is_not_bundled(bundling, tmp_path, old, new, said):
    for name in ("pyproject.toml", *bundling.APP_FILES):
        shutil.copy(ROOT / name, tmp_path)
    text = (ROOT / SLIM).read_text()
    assert text.count(old) == 1
    (tmp_path / SLIM).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match="the manifests disagree") as error:
        bundling.bundle(tmp_path, tmp_path / "dist")
    assert said in str(error.value)
    assert not (tmp_path / "dist").exists()


def test_settings_of_both_manifests_are_brought_up_to_date(bundling, tmp_path):
    """A table of settings that has been edited by hand is made again from the declarations; all else stays."""
    (tmp_path / "docs").mkdir()
    for name in ("pyproject.toml", SLIM, "docs/settings.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    slim = tmp_path / SLIM
    slim.write_text(slim.read_text().replace("mu = 0.5", "mu = 0.25").replace("fraction-train = 1.0\n", ""))
    assert bundling.disagreements(tmp_path)
    main(["--write", "--root", str(tmp_path)])
    assert bundling.disagreements(tmp_path) == []
    assert slim.read_text() == (ROOT / SLIM).read_text()


# --- bundle and wheel ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bundle_holds_the_app_and_nothing_else(bundle):
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert files == {"pyproject.toml", "client_app.py", "server_app.py", "README.md", "LICENSE", ".info/CONTENT"}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    package = (path for path in (ROOT / "cafe_flwr").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.startswith(f"cafe_flwr-{__version__}.dist-info/")}
    assert names - metadata == {str(path.relative_to(ROOT)) for path in package}


RUN = """
import importlib.metadata, sys
import torch
import cafe_flwr
from cafe_flwr import CafeDistill, make_client_app
from cafe_flwr.data import load_federation
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.networks import ConvNet

torch.set_num_threads(1)
assert cafe_flwr.__file__.startswith(sys.prefix), cafe_flwr.__file__
federation = load_federation("digits", num_clients=4, examples_per_client=40)
app = make_client_app(lambda context: ConvNet((1, 16, 16), 10), lambda client, context: federation.load(client))
grid = InProcessGrid(app, 2, node_config={"state-dir": sys.argv[1]})
result = CafeDistill(num_rounds=2, num_clients=4).start(grid)
(command,) = importlib.metadata.entry_points(group="console_scripts", name="cafe-flwr")
print(importlib.metadata.version("cafe-flwr"), sorted(result.train_metrics_clientapp), callable(command.load()))
"""


@pytest.mark.slow
def test_the_wheel_is_installed_and_runs(python, tmp_path):
    """Two rounds, from another folder; the personal networks are where they were asked for."""
    assert output_of(python, RUN, tmp_path, tmp_path / "state").splitlines()[-1] == f"{__version__} [1, 2] True"
    assert len(list((tmp_path / "state").glob("client-*.safetensors"))) == 4


RUN_BUNDLE = """
import json, sys
sys.path.append(sys.argv[1])
from pathlib import Path
import cafe_flwr
from apps import load_app

assert cafe_flwr.__file__.startswith(sys.prefix), cafe_flwr.__file__
config = {"num_server_rounds": 2, "num_clients": 4, "dataset": "digits", "examples_per_client": 40}
load_app(Path(sys.argv[2])).run(2, name="bundled", results_dir=sys.argv[3], **config)
"""


@pytest.mark.slow
def test_the_bundle_runs_on_the_installed_wheel(python, bundle, tmp_path):
    """The app files come from the bundle, the package from the wheel: nothing of this checkout is there."""
    output_of(python, RUN_BUNDLE, tmp_path, ROOT / "tests", bundle, tmp_path)
    summary = json.loads((tmp_path / "bundled" / "summary.json").read_text())
    assert (summary["method"], summary["num_rounds"], summary["num_clients"]) == ("cafedistill", 2, 4)
    assert len(list((tmp_path / "bundled" / "personal").glob("client-*.safetensors"))) == 4
