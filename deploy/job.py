"""The job of the check: small data for each client, settings, and the same job undisturbed in one process.

``python deploy/job.py FOLDER`` runs it there, with the app in ``FOLDER/app`` and the data in ``FOLDER/data``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

CLIENTS = 3
ROUNDS = 8
UNDISTURBED = 3  # rounds in which all clients take part, whatever else is killed
_EXAMPLES = 150  # of a client


def write_data(folder: Path) -> None:
    """Images of handwritten digits, some more often than others for each client: a folder per client and class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for client in range(CLIENTS):
        often = [(3 * client + k) % 10 for k in range(4)]
        weights = np.where(np.isin(digits.target, often), 5.0, 1.0)
        rows = np.random.default_rng(client).choice(len(weights), _EXAMPLES, replace=False, p=weights / weights.sum())
        for row in rows:
            path = folder / f"client-{client}" / str(digits.target[row]) / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[row] * 15.9).astype(np.uint8)).save(path)


def run_config(folder: Path, name: str) -> dict[str, Any]:
    """Settings of the run of this name, which writes to ``<folder>/results/<name>``."""
    return {
        "name": name,
        "results-dir": str(folder / "results"),
        "dataset": "local",
        "data.class-names": ",".join(map(str, range(10))),
        "data.image-size": 16,
        "data.image-channels": 1,
        "num-clients": CLIENTS,
        "num-server-rounds": ROUNDS,
        "federation.round-timeout": 240.0,
        "federation.wait-seconds": 180.0,
    }


def node_config(folder: Path, client: int) -> dict[str, str]:
    """The node-config of a client's own node."""
    return {
        "clients": str(client),
        "name": f"node-{client}",
        "data-dir": str(folder / "data" / f"client-{client}"),
        "state-dir": str(folder / "state" / f"node-{client}"),
    }


def run_reference(folder: Path) -> None:
    """Run the undisturbed rounds in this process, all clients on one node, as run ``reference``.

    The clients' state is in ``state/reference``, up to the last of these rounds.
    """
    from cafe_flwr.app.run import build_strategy
    from cafe_flwr.engine import InProcessGrid
    from cafe_flwr.results.recorder import Recorder
    from cafe_flwr.server.callbacks import RoundRecord
    from cafe_flwr.server.checkpoints import ServerState
    from cafe_flwr.settings import Settings

    class Enough(Exception):
        pass

    class RecorderOfSome(Recorder):
        def on_round(self, record: RoundRecord, state: ServerState) -> None:
            super().on_round(record, state)
            if record.server_round == UNDISTURBED:
                raise Enough

    settings = Settings.from_run_config(run_config(folder, "reference"))
    node = {
        "clients": ",".join(map(str, range(CLIENTS))),
        "data-dir": str(folder / "data"),
        "state-dir": str(folder / "state" / "reference"),
    }
    app = load_module(folder / "app" / "client_app.py").app
    settings.results.mkdir(parents=True)
    recorder = RecorderOfSome(settings.results, settings.to_run_config())
    with contextlib.suppress(Enough):
        build_strategy(settings, recorder).start(InProcessGrid(app, 1, settings.to_run_config(), node))
    recorder.close()


def load_module(path: Path) -> ModuleType:
    """Import a Python file that is in no package."""
    spec = importlib.util.spec_from_file_location(f"of_the_job_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    run_reference(Path(sys.argv[1]))
