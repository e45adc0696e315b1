"""What devices and GPU benchmarks use needs torch and numpy, and nothing else."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import importlib.util as util
for absent in "flwr ray flwr_datasets datasets matplotlib pandas pydantic sklearn torchmetrics".split():
    assert util.find_spec(absent) is None, absent

import numpy as np
import torch
import cafe_flwr
from cafe_flwr import EarlyExitNetwork, coordination, cost, data, metrics, teaching, training
from cafe_flwr.core import schema
from cafe_flwr.training import losses
from cafe_flwr.wire import averaging
from cafe_flwr.methods import CafeDistillMethod, LocalTask, METHODS, exit_agreement
from cafe_flwr.networks import ConvNet
from cafe_flwr.core.random import rng_for

network = ConvNet((1, 16, 16), num_classes=10)
assert isinstance(network, EarlyExitNetwork)
split = data.Split(torch.randn(32, 1, 16, 16), torch.randint(10, (32,)))
active = coordination.active_exits(1, 1, [[0.0, 0.0]])
weights = teaching.teacher_weights([[1.0, 0.5], [0.5, 1.0]], [0.5, 0.5], mu=0.5)
budget = training.LocalBudget(steps=2)
task = LocalTask(network, split, active[0].tolist(), {}, budget, lambda purpose: rng_for(0, 1, 0, purpose))
result = CafeDistillMethod().train(task)
similarity = exit_agreement.classifier_similarity(network)
assert np.isfinite(result.loss) and len(similarity) == 2 and weights.shape == (2, 2)
assert cost.macs_per_exit(network, split.x[:1])[0] > 0
initial = training.snapshot(network)
for kind in METHODS.values():
    method = kind()
    state = method.extra_tensors(network)
    rng = lambda purpose: rng_for(0, 1, 0, purpose)
    task = LocalTask(network, split, [True, True], {}, budget, rng, state=state, initial=initial)
    assert np.isfinite(method.train(task).loss) and task.steps == 2
    network.load_state_dict(method.deploy({**network.state_dict(), **task.state}), strict=False)
print(cafe_flwr.__version__)
"""


def installed_with(*names: str) -> set[str]:
    """Distributions that are there when these are installed, in this environment's versions."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            needs = (Requirement(need) for need in metadata.requires(name) or ())
            left += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.slow
def test_pure_parts_work_where_only_torch_and_numpy_are_installed(tmp_path):
    """Those two with what they need, and nothing else of this environment: the package imports, coordinates, matches
    teachers and trains a client."""
    (tmp_path / "packages").mkdir()
    for name in installed_with("torch", "numpy"):
        for top in {path.parts[0] for path in metadata.files(name) or ()} - {"..", "__pycache__"}:
            target = tmp_path / "packages" / top
            if not target.exists():
                target.symlink_to(Path(metadata.distribution(name).locate_file(top)))
    done = subprocess.run(
        [sys.executable, "-S", "-W", "error", "-c", PROGRAM],  # without this environment's own packages
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path / 'packages'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.1.0"
