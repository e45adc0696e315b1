"""Numbers and message bytes of small runs of every method, pinned in ``golden.json``: what moving code must not change.

``python tests/golden.py`` says what differs, ``python tests/golden.py --write`` pins what is there now. Bits depend on
torch and the machine: ``golden.json`` says on which they were taken, and on another only figures are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from federations import Recorded, digits_app, run_small, run_until, small_settings
from flwr.app import ArrayRecord, Message
from torch import Tensor

from cafe_flwr.engine import InProcessGrid
from cafe_flwr.methods import METHODS

PINNED = Path(__file__).with_name("golden.json")
FORMS: Mapping[str, Mapping[str, Any]] = {
    "alike": {},
    "unequal": {"depth_shares": "1:0.2,2:0.4"},
    "float16": {"wire_dtype": "float16"},
    "resumed": {"fraction_train": 0.6},
}
_RUN = {"num_server_rounds": 3, "seed": 7}
_CHANCE = {"run", "seconds-train", "seconds-evaluate"}  # differ between equal runs


def machine() -> dict[str, str]:
    """On what bits depend."""
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


class WatchedGrid(InProcessGrid):
    """Takes a hash of everything that travels, but tokens and times."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hash = hashlib.sha256()

    def _handle(self, message: Message) -> Message:
        reply = super()._handle(message)
        for one in (message, reply):
            self.hash.update(one.metadata.message_type.encode())
            for key, record in sorted(one.content.items()):
                self.hash.update(key.encode())
                if isinstance(record, ArrayRecord):
                    for name, array in record.items():
                        self.hash.update(f"{name} {array.dtype} {array.shape}".encode() + array.data)
                else:
                    values = {name: value for name, value in record.items() if name not in _CHANCE}
                    self.hash.update(repr(sorted(values.items())).encode())
        return reply


def run(method: str, form: str) -> dict[str, Any]:
    """A run of a method: hashes of messages, networks and state, records; and figures for other machines."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")) as folder:
        settings = small_settings(Path(folder), method=method, **_RUN, **FORMS[form])
        if form == "resumed":
            run_until(settings, 2)
            settings = settings.model_copy(update={"resume": True})
        grid = WatchedGrid(digits_app(), 2, settings.to_run_config())
        run_small(settings, grid=grid)
        found = Recorded.read(settings.results)
    networks = [item for client in sorted(found.networks) for item in sorted(found.networks[client].items())]
    states = [(f"{name} {key}", t) for name, (_, kept) in found.versions.items() for key, t in sorted(kept.items())]
    records = json.dumps([found.rounds, found.summary, found.rows.to_dict("list")], sort_keys=True, default=str)
    return {
        "messages": grid.hash.hexdigest()[:16],
        "networks": _hash_of(networks),
        "state": _hash_of(states),
        "records": hashlib.sha256(records.encode()).hexdigest()[:16],
        "accuracy": found.summary["accuracy_per_exit"],
        "norm": float(sum(t.double().square().sum() for _, t in networks)) ** 0.5,
    }


def _hash_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    hashed = hashlib.sha256()
    for name, tensor in tensors:
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


def differences(found: Mapping[str, Any], pinned: Mapping[str, Any], *, exact: bool) -> list[str]:
    """What of a run is not as it was pinned."""
    if exact:
        return [key for key in pinned if found[key] != pinned[key]]
    close = {"accuracy": 0.1, "norm": 0.01 * pinned["norm"]}  # a few test examples may fall on the other side
    return [key for key, bound in close.items() if not np.allclose(found[key], pinned[key], atol=bound, rtol=0.0)]


def main() -> None:
    """Compare, or pin."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    runs = {f"{method} {form}": run(method, form) for method in sorted(METHODS) for form in FORMS}
    if write:
        PINNED.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
        return
    pinned = json.loads(PINNED.read_text())
    for name, one in runs.items():
        if wrong := differences(one, pinned["runs"][name], exact=machine() == pinned["machine"]):
            print(name, *wrong)


if __name__ == "__main__":
    main()
