"""One torch thread per process, as in the workers; Flower's home in a temporary folder."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_homes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a test may land in the user's home."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("FLWR_HOME", str(home / "flwr"))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
