"""Evaluation of the personal networks of a finished run: accuracy, calibration and risk, also on corrupted inputs.

Temperatures and thresholds come from the calibration splits; the test splits are used for measuring only. ``own``
thresholds are calibrated by a client for itself, ``pooled`` ones on the calibration examples of all clients together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cafe_flwr.core.files import to_json, write_atomically
from cafe_flwr.data.corruptions import CORRUPTIONS
from cafe_flwr.metrics.exits import ECE_BINS
from cafe_flwr.metrics.selective import VOID
from cafe_flwr.personal.client_evaluation import CLEAN, ClientEvaluation, certify_together, evaluate_client
from cafe_flwr.personal.evaluation_tables import long_table, put_together
from cafe_flwr.personal.published import PersonalNetworks, read_metadata
from cafe_flwr.risk.thresholds import GUARANTEES

RISKS = (0.01, 0.05, 0.10)
SEVERITIES = (1, 3, 5)


def evaluate_run(  # noqa: PLR0913 (public, all by name)
    run: PersonalNetworks,
    *,
    clients: Sequence[int] | None = None,
    risks: Sequence[float] = RISKS,
    guarantee: str = "selective",
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate personal networks; write ``evaluation.json`` and ``evaluation.parquet`` beside them.

    Parameters
    ----------
    run
        A finished run, or one client's network on its node.
    clients
        Some of its clients, by default all.
    risks, guarantee
        For :func:`cafe_flwr.risk.calibrate`.
    corruptions, severities
        Among ``CORRUPTIONS``, and 1..5. Data other than images are not corrupted, which a note then says.
    seed
        Of the corruptions and of the calibration's folds.
    progress
        Called with the numbers of clients done and to do.

    Returns
    -------
    What ``evaluation.json`` holds. The parquet file is a long table with the values of every client.

    Raises
    ------
    ValueError
        For a client, risk, guarantee, corruption or severity that does not exist.
    """
    chosen = _check(run, clients, risks, guarantee, corruptions, severities)
    notes = _notes(run.run_config)
    conditions = [CLEAN, *((name, severity) for name in corruptions for severity in severities)]
    found: list[ClientEvaluation] = []
    for done, client in enumerate(chosen):
        if progress:
            progress(done, len(chosen))
        data, network = run.data(client), run.personal(client).network
        shape = tuple(data.test.x.shape[1:])
        if len(shape) != 3 and len(conditions) > 1:
            conditions = [CLEAN]
            notes.append(f"The inputs are no images (channels, height, width) but {shape}, so nothing was corrupted.")
        found.append(evaluate_client(client, network, data, conditions, risks=risks, guarantee=guarantee, seed=seed))
    if progress:
        progress(len(chosen), len(chosen))
    pooled = certify_together(found, risks, guarantee, seed)
    evaluation = {
        "name": run.name,
        "guarantee": guarantee,
        "risks": list(risks),
        "seed": seed,
        "ece_bins": ECE_BINS,
        "macs_per_exit": found[0].macs,
        "notes": notes,
        **put_together(found, pooled, guarantee=guarantee, shifted=bool(run.run_config.get("data.test-shift"))),
    }
    write_atomically(run.output("evaluation.parquet"), long_table(found, pooled).to_parquet(index=False))
    write_atomically(run.output("evaluation.json"), to_json(evaluation, indent=1))
    return evaluation


def _check(
    run: PersonalNetworks,
    clients: Sequence[int] | None,
    risks: Sequence[float],
    guarantee: str,
    corruptions: Sequence[str],
    severities: Sequence[int],
) -> list[int]:
    """The clients to evaluate; ValueError for what does not exist."""
    there = run.clients
    chosen = there if clients is None else list(dict.fromkeys(clients))
    if not there or not chosen:
        raise ValueError(f"{run.networks} holds no personal network to evaluate: the run must have ended")
    if unknown := [client for client in chosen if client not in there]:
        raise ValueError(f"clients {unknown} have no personal network in {run.networks}: there are {there}")
    if guarantee not in GUARANTEES:
        raise ValueError(f"guarantee must be one of {', '.join(GUARANTEES)}, got {guarantee!r}")
    if bad := [risk for risk in risks if not 0 < risk < 1]:
        raise ValueError(f"risks are shares of errors between 0 and 1, e.g. 0.05 for 5 %, got {bad}")
    if bad_names := [name for name in corruptions if name not in CORRUPTIONS]:
        raise ValueError(f"corruptions must be among {', '.join(CORRUPTIONS)}, got {bad_names}")
    if bad_levels := [severity for severity in severities if severity not in range(1, 6)]:
        raise ValueError(f"severities must be 1 (slight) to 5, got {bad_levels}")
    _check_alike(run, chosen)
    return chosen


def _check_alike(run: PersonalNetworks, clients: Sequence[int]) -> None:
    """ValueError if the clients' networks differ: their exits cannot be put together in one table."""
    kinds: dict[tuple[str, int, float], list[int]] = {}
    for client in clients:
        metadata = read_metadata(run.networks, client)
        exits = int(metadata.get("num_exits") or len(metadata["temperatures"]))
        kind = (str(metadata.get("modality", "")), exits, float(metadata.get("width", 1.0)))
        kinds.setdefault(kind, []).append(client)
    if len(kinds) > 1:
        each = "; ".join(
            f"{f'{modality}, ' * bool(modality)}{exits} exits{f' at width {width:g}' * (width < 1)}: "
            f"{','.join(map(str, some))}"
            for (modality, exits, width), some in kinds.items()
        )
        raise ValueError(
            f"these clients hold different networks, evaluate those of a kind together (--clients): {each}"
        )


def _notes(settings: Mapping[str, Any]) -> list[str]:
    notes = []
    if settings.get("data.validation-share"):
        notes.append("Measured on validation examples taken from the training data: the run had a validation-share.")
    if settings.get("data.test-shift"):
        notes.append(f"The run had a test-shift: its test examples have other class priors; {VOID}.")
    return notes
