"""One torch thread per process, as in the workers; temporary folders in memory; where real data are."""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cafe_flwr.app.launch import private_superlink

torch.set_num_threads(1)

# Of a device that is not there, torch.manual_seed notes seed and stack for later: a tenth of the time of a small run.
for _device in (torch.cuda, torch.xpu, torch.mtia):
    if not _device.is_available():
        _device.manual_seed_all = lambda seed: None

# A small run waits for the disk a hundred times. In memory it makes the same calls, and they take no time.
_MEMORY = Path("/dev/shm")
if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))  # pytest's name for where its folders go


_FIRST = ("test_faults_processes.py", "test_flower.py", "test_deploy.py")  # which wait a lot


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of real processes get time and come first, then files with the most slow tests: workers end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    for item in items:
        if item.get_closest_marker("flower"):
            item.add_marker(pytest.mark.timeout(900))
    items.sort(key=lambda item: (*(item.path.name != name for name in _FIRST), -slow[item.path]))


@pytest.fixture(autouse=True)
def _own_homes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a test may land in the user's home."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("FLWR_HOME", str(home / "flwr"))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with copies of real sets (docs/data.md): CAFE_FLWR_DATA, or ../shared/data beside the project."""
    folder = Path(os.environ.get("CAFE_FLWR_DATA") or Path(__file__).parents[2] / "shared" / "data").expanduser()
    if not folder.is_dir():
        pytest.skip(f"no real data: there is no folder {folder}; set CAFE_FLWR_DATA to one")
    return folder.resolve()


@pytest.fixture(scope="session")
def superlink() -> Iterator[dict[str, str]]:
    """Environment of a SuperLink in simulation mode, one for all tests."""
    with private_superlink() as env:
        # Actors of the simulation share two cores: a thread each.
        yield {**env, "OMP_NUM_THREADS": "1"}


class FlowerLog(logging.Handler):
    """What Flower's logger was told, whether it propagates or not."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.records.append(record)

    def text(self, level: int = logging.WARNING) -> str:
        """All messages from a level on, a line each."""
        return "\n".join(record.getMessage() for record in self.records if record.levelno >= level)


@pytest.fixture
def flower_log() -> Iterator[FlowerLog]:
    """The log of the package, which is Flower's."""
    handler, logger = FlowerLog(), logging.getLogger("flwr")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write no page: it takes longer than all the rest of a small run."""
    monkeypatch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
