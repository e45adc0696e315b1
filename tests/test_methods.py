"""What every method promises, whichever it is: this suite runs for all of METHODS. A new method needs its row in TABLE.

A federation of toys runs with real messages; what is checked is what travels, what stays, and what survives.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from federations import (
    CLASSES,
    DeviceGrid,
    FaultyApp,
    WatchedGrid,
    asked,
    same_arrays,
    same_tensors,
    strict_json,
    toy_app,
    toy_data,
    toy_network,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from safetensors.torch import load_file

from cafe_flwr.core.files import to_json
from cafe_flwr.core.options import options_of
from cafe_flwr.core.random import rng_for
from cafe_flwr.core.schema import Schema
from cafe_flwr.data import ClientData, Split
from cafe_flwr.methods import METHODS, ClientRecord, LocalTask, ServerRound, settings_of
from cafe_flwr.methods.registry import method_from
from cafe_flwr.methods.starts import classifier_start
from cafe_flwr.metrics import evaluate
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.server.checkpoints import Checkpoints
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.settings import OPTIONS, Settings
from cafe_flwr.training import LocalBudget
from cafe_flwr.wire.describe import NodeInfo
from cafe_flwr.wire.keys import Keys

N, T = 4, 4
BUDGET = LocalBudget(batch_size=8, steps=3, learning_rate=0.1)

# --- docs/methods.md as data: what travels and what stays, by name, in a network of two exits -------------------------

STAGES = ["stages.0.0.weight", "stages.0.0.bias", "stages.1.0.weight", "stages.1.0.bias"]
PROJECTIONS = [f"exits.{k}.projection.{name}" for k in (0, 1) for name in ("weight", "bias")]
BACKBONE = [*STAGES, *PROJECTIONS]
HEADS = ["exits.0.head.weight", "exits.0.head.bias", "exits.1.head.weight", "exits.1.head.bias"]
LAST = ["exits.1.head.weight", "exits.1.head.bias"]
NETWORK = [*BACKBONE, *HEADS]

# 5 inputs → 8 → 8, projected to 4 features, 3 classes.
SHAPES = {
    "stages.0.0.weight": (8, 5),
    "stages.0.0.bias": (8,),
    "stages.1.0.weight": (8, 8),
    "stages.1.0.bias": (8,),
    "exits.0.projection.weight": (4, 8),
    "exits.0.projection.bias": (4,),
    "exits.1.projection.weight": (4, 8),
    "exits.1.projection.bias": (4,),
    "exits.0.head.weight": (3, 4),
    "exits.0.head.bias": (3,),
    "exits.1.head.weight": (3, 4),
    "exits.1.head.bias": (3,),
    "class-counts": (3,),
    "class-means": (2, 3, 4),
    "prototypes": (2, 3, 4),
    "variance": (1,),
}


def shape_of(name):
    """Updates and copies have the shapes of what they are of."""
    return SHAPES[name.removeprefix("update.").removeprefix("personal.")]


def prefixed(prefix, names):
    return [prefix + name for name in names]


class Row(NamedTuple):
    """Names of tensors: averaged over clients, on the client's disk, sent and received as a client's own."""

    averaged: list[str]
    personal: list[str]
    up: Sequence[str] = ()
    down: Sequence[str] = ()


# Of cafedistill-prior: the backbone as the client left it, beside the average; and its classifiers since the start.
OWN_BACKBONE, HEAD_UPDATES = prefixed("own.", BACKBONE), prefixed("update.", HEADS)
PRIOR = Row(BACKBONE, [*HEADS, *OWN_BACKBONE], [*HEAD_UPDATES, "class-means", "class-counts"], HEAD_UPDATES)
RELEASED = Row(BACKBONE, HEADS, LAST, LAST)
EVERYTHING_AVERAGED = Row(NETWORK, [])
EXITS_PERSONAL = Row(BACKBONE, HEADS)
MIXTURES = Row([], NETWORK, prefixed("update.", NETWORK), prefixed("update.", NETWORK))
TABLE = {
    "local": Row([], NETWORK),
    "fedavg": EVERYTHING_AVERAGED,
    "fedprox": EVERYTHING_AVERAGED,
    "depthfl": EVERYTHING_AVERAGED,
    "scalefl": EVERYTHING_AVERAGED,
    "fedper": EXITS_PERSONAL,
    "fedrep": EXITS_PERSONAL,
    "fedbabu": EXITS_PERSONAL,
    "local-kd": EXITS_PERSONAL,
    "fedamp": MIXTURES,
    "pfedgraph": MIXTURES,
    "fedrod": Row(NETWORK, prefixed("personal.", HEADS)),
    "ditto": Row(NETWORK, prefixed("personal.", NETWORK)),
    "fedpac": Row(BACKBONE, HEADS, [*HEADS, "class-means", "variance", "class-counts"], [*HEADS, "prototypes"]),
    "cafedistill": RELEASED,
    "cafedistill classifier_start=own": RELEASED,
    "cafedistill write_back=False": RELEASED,
    "cafedistill-plus": Row(BACKBONE, HEADS, HEADS, HEADS),
    "cafedistill-text": Row(BACKBONE, HEADS, LAST, LAST),
    "cafedistill-text teachers=own": EXITS_PERSONAL,
    "cafedistill-text peers=deeper": Row(BACKBONE, HEADS, HEADS, LAST),
    "cafedistill-prior": PRIOR,
    "cafedistill-prior match_by=classifiers": PRIOR._replace(up=[*HEAD_UPDATES, "class-counts"]),
    "cafedistill-prior counts=noised match_by=classifiers": PRIOR._replace(up=[*HEAD_UPDATES, "class-counts"]),
    "cafedistill-prior counts=none match_by=classifiers": PRIOR._replace(up=HEAD_UPDATES),
}
TWO_PHASES = {"ditto", "fedrep", "fedpac"}  # train two things in a round
DISTILLING = {"cafedistill", "cafedistill-plus", "cafedistill-prior", "cafedistill-text", "local-kd"}
REFUSED = {("fedrod", "prior"), *((name, "distill") for name in DISTILLING)}
# The server must know what classifiers start from.
NOT_FOR = {(name, "classifier_start"): "built" for name in ("cafedistill", "cafedistill-plus")} | {
    (name, "classifier_start"): "own" for name in ("fedamp", "pfedgraph")
}


# What another value of a setting needs beside it.
WITH = {("cafedistill-prior", "counts"): {"match_by": "classifiers"}}


# --- every method as it is, and with each of its settings at other values --------------------------------------------


def other_values(name, f):
    """Values of a method's setting other than its default, its bounds among them."""
    bounds = f.metadata
    if isinstance(f.default, bool):
        return [not f.default]
    if isinstance(f.default, str):
        return [
            value for value in bounds["choices"] or ("osqp",) if value not in (f.default, NOT_FOR.get((name, f.name)))
        ]
    limits = [bounds[key] for key in ("ge", "le") if bounds[key] is not None]
    values = {type(f.default)(value) for value in (*limits, f.default / 2)} - {f.default}
    return sorted(values) or [f.default + 1]


def described(variant):
    return " ".join([variant[0], *(f"{key}={value}" for key, value in variant[1].items())])


def scalars(cls):
    """Fields of a method's own settings; objectives have tests of their own."""
    return [f for f in fields(cls) if f.name != "objective"]


PLAIN = [(name, {}) for name in sorted(METHODS)]
VARIANTS = [
    (name, {f.name: value} | WITH.get((name, f.name), {}))
    for name in sorted(METHODS)
    for f in scalars(METHODS[name])
    if (name, f.name) not in REFUSED
    for value in other_values(name, f)
]
# Without the switches of every method, which have tests of their own.
SWITCHES = {"prior", "distill", "equal_steps", "classifier_start"}
OWN = [v for v in (*PLAIN, *VARIANTS) if not SWITCHES & set(v[1])]
# Variants for which other things travel, or other code trains.
SPECIAL = [v for v in VARIANTS if described(v) in TABLE or v[1] == {"similarity_proxy": "gradients"}]


def build(variant):
    return METHODS[variant[0]](**variant[1])


def row_of(variant):
    """The method's row in the table; settings that have none of their own change nothing there."""
    return TABLE.get(described(variant), TABLE[variant[0]])


def of_method(name):
    """The method as it is, and with each of its settings at other values."""
    return [v for v in (*PLAIN, *VARIANTS) if v[0] == name]


every_method = pytest.mark.parametrize("name", sorted(METHODS))
own_variants = pytest.mark.parametrize("variant", OWN, ids=described)
some_variants = pytest.mark.parametrize("variant", [*PLAIN, *SPECIAL], ids=described)
plain_methods = pytest.mark.parametrize("variant", PLAIN, ids=described)


def known_rng(store, client, purpose):
    """In the place of a client's private generator."""
    return rng_for(0, 0, client, purpose)


@pytest.fixture(scope="module", autouse=True)
def _the_same_noise():
    """Noise comes from a secret of the operating system's; here a client's noise is the same in every run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PersonalStore, "private_rng", known_rng)
        yield


# --- a federation of toys, watched -----------------------------------------------------------------------------------


class Save:
    """A callback that checkpoints, and keeps the records and the final reports."""

    def __init__(self, folder):
        self.checkpoints, self.records, self.reports = Checkpoints(folder / "checkpoint"), {}, []

    def on_start(self, run):
        pass

    def on_round(self, record, state):
        self.checkpoints.save(state)
        self.records[record.server_round] = record

    def on_finish(self, reports):
        self.reports = reports


class Trained(NamedTuple):
    """A client's tensors as local training found and left them: the network's, and those beside it."""

    found: dict[str, torch.Tensor]
    left: dict[str, torch.Tensor]


@dataclass
class Run:
    """A federation that has run."""

    variant: tuple[str, dict[str, Any]]
    folder: Path
    result: Any
    grid: WatchedGrid
    notes: Save
    trained: dict[tuple[int, int], Trained] = field(default_factory=dict)

    @property
    def published(self):
        """The personal networks, by client."""
        paths = sorted((self.folder / "personal").glob("client-*.safetensors"))
        return {int(path.stem.split("-")[1]): load_file(path) for path in paths}

    def kept(self, client, server_round):
        """What is on a client's disk after a round; what it starts from before the first one."""
        row = row_of(self.variant)
        if not server_round:
            weights = start_of(self.variant, client)
            start = {prefix + name: t for prefix in ("", "own.", "personal.") for name, t in weights.items()}
            if self.variant[0] == "fedrod":  # its personal classifiers begin at 0
                start |= {name: torch.zeros_like(start[name]) for name in row.personal}
            return {name: start[name] for name in row.personal if name in start}
        folder = self.folder / "personal" / "versions"
        (path,) = folder.glob(f"*/client-{client}/round-{server_round:06d}.safetensors")
        return load_file(path)

    def messages(self, kind, server_round):
        return [(m, r) for m, r in self.grid.of_type(kind) if m.content["config"]["server-round"] == server_round]

    def schema(self, kind):
        """What the nodes said when they were first asked."""
        infos = [NodeInfo.from_message(reply, Keys()) for _, reply in self.grid.of_type("query")]
        (names,) = {tuple(getattr(info, kind).entries) for info in infos}
        return Schema(names)

    def sent(self, message):
        """The shared part and the download in a message for one client, by name."""
        flat = message.content["arrays"]["flat"].numpy()
        size = self.schema("shared").size
        down = self.schema("download").unpack(flat[size:]) if len(flat) > size else {}
        return self.schema("shared").unpack(flat[:size]), down


def initial(exits=2):
    """The weights of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: t.clone() for name, t in toy_network(exits).state_dict().items()}


def start_of(variant, client):
    """Where a client starts: the weights of the seed, but its personal classifiers from 0 unless the method says
    otherwise."""
    weights, start = initial(), build(variant).classifier_start
    heads = [(name, SHAPES[name]) for name in HEADS if name in row_of(variant).personal]
    return weights if start == "built" else weights | classifier_start(heads, start, 0, client)


def federate(folder, variant, num_nodes=2, rounds=T, *, app=None, grid=None, exits=2, **options):
    """Run a federation of toys; T rounds unless told otherwise."""
    notes = Save(folder)
    app = app or toy_app(build=lambda: toy_network(exits))
    grid = grid or WatchedGrid(app, num_nodes, node_config={"state-dir": str(folder / "personal")})
    options = {"num_clients": N, "num_rounds": T, "local": BUDGET, "wait_seconds": 0.0, "callbacks": [notes]} | options
    result = FederatedStrategy(method=build(variant), **options).start(grid, num_rounds=rounds)
    return Run(variant, folder, result, grid, notes)


def quietly(folder, variant, num_nodes=2, **options):
    """The same with evaluation in the last round only: faster."""
    return federate(folder, variant, num_nodes, evaluate_every=T, **options)


def assert_same_outcome(a, b, clients=range(N)):
    """Shared parameters, personal networks and final reports are equal bit for bit."""
    assert same_arrays(a.result.arrays, b.result.arrays)
    for client in clients:
        assert same_tensors(a.published[client], b.published[client]), f"client {client}"
    assert [(r.client, r.exits, r.local_steps) for r in a.notes.reports] == [
        (r.client, r.exits, r.local_steps) for r in b.notes.reports
    ]


@pytest.fixture(scope="module", params=[*PLAIN, *SPECIAL], ids=described)
def run(request, tmp_path_factory):
    """Four rounds of four clients, each on its own node, that several tests look at."""
    cls, trained = METHODS[request.param[0]], {}
    train = cls.train

    def watched(method, task):
        def tensors():
            return {name: t.detach().clone() for name, t in {**task.network.state_dict(), **task.state}.items()}

        found = tensors()
        result = train(method, task)
        client = (len(task.data) - 12) // 5  # as toy_data sizes them
        trained[task.server_round, client] = Trained(found, tensors())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "train", watched)
        done = federate(tmp_path_factory.mktemp("run"), request.param, num_nodes=N)
    done.trained = trained
    return done


# --- what a method is ------------------------------------------------------------------------------------------------


def test_every_method_is_registered_under_its_name_and_has_a_row():
    assert {cls.name: cls for cls in METHODS.values()} == METHODS
    assert {name.partition(" ")[0] for name in TABLE} == set(METHODS)
    assert {name for name in METHODS if METHODS[name].phases == 2} == TWO_PHASES
    for name in METHODS:
        assert type(Settings.from_run_config({"method": name}).build_method()) is METHODS[name]


@every_method
def test_settings_are_scalars_that_survive_the_wire(name):
    """A client builds the same object from what it is sent."""
    for variant in of_method(name):
        method = build(variant)
        values = settings_of(method)
        assert all(type(value) in (int, float, bool, str) for value in values.values())
        assert list(values) == list(settings_of(type(method)()))
        record = RecordDict({"config": ConfigRecord(values)})
        back = recorddict_from_proto(recorddict_to_proto(record))["config"]
        assert method_from(name, back) == method
        assert {key: type(value) for key, value in back.items()} == {key: type(value) for key, value in values.items()}


@plain_methods
def test_a_method_does_not_change(variant):
    method = build(variant)
    for f in fields(method):
        with pytest.raises(FrozenInstanceError):
            setattr(method, f.name, getattr(method, f.name))


@plain_methods
def test_every_setting_says_what_it_is_and_can_be_set_in_a_run(variant):
    """It has a doc, a default, and a name in the method's table among all settings; a value set arrives."""
    cls = METHODS[variant[0]]
    keys = {o.field: o.key for o in options_of(cls)}
    for f in scalars(cls):
        assert len(f.metadata["doc"]) > 10
        assert f.metadata["doc"].endswith(".")
        offered = OPTIONS[keys[f.name]]
        assert (offered.doc, offered.default) == (f.metadata["doc"], f.default)
        for value in other_values(cls.name, f) if (cls.name, f.name) not in REFUSED else []:
            too = WITH.get((cls.name, f.name), {})
            config = {"method": cls.name, keys[f.name]: value} | {keys[n]: too[n] for n in too}
            set_so = Settings.from_run_config(config).build_method()
            assert settings_of(set_so) == {**settings_of(cls()), **too, f.name: value}


def beyond(f):
    """Values that a setting must refuse."""
    bounds = f.metadata
    if bounds["choices"] or isinstance(f.default, str):
        return ["nonsense"]
    if isinstance(f.default, bool):
        return []
    values = [bounds[key] - 1 for key in ("ge", "gt") if bounds[key] is not None]
    values += [bounds["gt"]] if bounds["gt"] is not None else []
    values += [bounds["le"] + 1] if bounds["le"] is not None else []
    return [type(f.default)(value) for value in values] + [math.nan] * isinstance(f.default, float)


@plain_methods
def test_every_bound_is_kept(variant):
    """By the method itself, for those who build one in code, and by a run's settings, before it starts."""
    cls = METHODS[variant[0]]
    keys = {o.field: o.key for o in options_of(cls)}
    for f in scalars(cls):
        assert beyond(f) or isinstance(f.default, bool), f"{f.name} has no bounds"
        for value in beyond(f):
            with pytest.raises(ValueError, match=f.name):
                cls(**{f.name: value})
            with pytest.raises(ValueError, match=keys[f.name]):
                Settings.from_run_config({"method": cls.name, keys[f.name]: value})


@pytest.mark.parametrize(("name", "switch"), sorted(REFUSED))
def test_a_switch_that_a_method_has_built_in_is_refused_with_the_reason(name, switch):
    for make in (
        lambda: METHODS[name](**{switch: True}),
        lambda: Settings.from_run_config({"method": name, switch: True}),
    ):
        with pytest.raises(ValueError, match=f"{switch} is not for {name}"):
            make()


# --- which tensors, by name ------------------------------------------------------------------------------------------


@every_method
def test_what_travels_and_what_stays_is_what_the_table_says(name):
    for variant in of_method(name):
        method, row, network = build(variant), row_of(variant), toy_network(exits=2)
        for names, expected in (
            (method.shared_names(network), row.averaged),
            (method.personal_names(network), row.personal),
            (method.upload_names(network), row.up),
            (method.download_names(network), row.down),
        ):
            assert sorted(names) == sorted(expected)


@every_method
def test_every_tensor_of_the_network_can_be_had(name):
    """From what is averaged, what was kept and what all start from the method makes a whole network, of any depth;
    names are named once, extra tensors have names of their own, and nothing is sent both averaged and as one's own."""
    for variant in of_method(name):
        method = build(variant)
        for exits in (1, 2, 4):
            network = toy_network(exits)
            extra = method.extra_tensors(network)
            tensors = {**network.state_dict(), **extra}
            assert not set(extra) & set(network.state_dict())
            lists = [
                names(network)
                for names in (method.shared_names, method.personal_names, method.upload_names, method.download_names)
            ]
            for names in lists:
                assert len(names) == len(set(names))
                assert set(names) <= set(tensors)
            assert not set(method.shared_names(network)) & set(method.upload_names(network))
            assert not set(method.shared_names(network)) & set(method.personal_names(network))
            deployed = method.deploy(tensors)
            shapes = {name: t.shape for name, t in network.state_dict().items()}
            assert {name: t.shape for name, t in deployed.items() if name in shapes} == shapes
            assert set(deployed) - set(shapes) <= set(extra)


def test_nodes_announce_what_the_table_says(run):
    """Names and shapes, written out in this file."""
    row = row_of(run.variant)
    for kind, names in (("shared", row.averaged), ("upload", row.up), ("download", row.down)):
        assert dict(run.schema(kind).entries) == {name: shape_of(name) for name in names}


# --- what travels ----------------------------------------------------------------------------------------------------


def test_what_is_sent_down_is_the_shared_part_and_the_clients_own_and_no_more(run):
    """One array: the shared part, and the download of a client that has one. Lists in the config are short."""
    row = row_of(run.variant)
    averaged, down = (sum(math.prod(shape_of(name)) for name in names) for names in (row.averaged, row.down))
    for server_round in range(1, T + 1):
        plan = run.notes.records[server_round].plan
        exchanges = run.messages("train", server_round)
        assert [asked(m) for m, _ in exchanges] == [[c] for c in range(N)]
        for message, _ in exchanges:
            (client,) = asked(message)
            config = message.content["config"]
            assert set(message.content) == {"arrays", "config"}
            assert list(message.content["arrays"]) == ["flat"]
            flat = message.content["arrays"]["flat"].numpy()
            has = client in plan.downloads
            assert flat.dtype == np.float32
            assert flat.shape == (averaged + has * down,)
            assert list(config.get("downloads", [])) == [client] * has
            if has:
                np.testing.assert_array_equal(flat[averaged:], plan.downloads[client])
            assert all(len(value) <= 4 for value in config.values() if isinstance(value, list | bytes))
        if row.down:  # from round 2 on the server knows all, and has something for each
            assert set(plan.downloads) == (set(range(N)) if server_round > 1 else set())


def test_what_is_sent_up_is_what_training_left_name_by_name(run):
    """Unpacked by the schema, a reply holds exactly: averaged tensors and uploads as the method left them; what begins
    with 'update.' is the client's network minus the initial one. Metrics are a few numbers."""
    row = row_of(run.variant)
    shared, upload = run.schema("shared"), run.schema("upload")
    for server_round in range(1, T + 1):
        for message, reply in run.messages("train", server_round):
            (client,) = asked(message)
            assert set(reply.content) == {"arrays", "config", "metrics"}
            assert list(reply.content["arrays"]) == ["flat"]
            flat = reply.content["arrays"]["flat"].numpy()
            assert flat.dtype == np.float32
            assert flat.shape == (shared.size + upload.size,)
            sent = {**shared.unpack(flat[: shared.size]), **upload.unpack(flat[shared.size :])}
            left, start = run.trained[server_round, client].left, start_of(run.variant, client)
            assert sorted(sent) == sorted([*row.averaged, *row.up])
            for name, tensor in sent.items():
                original = name.removeprefix("update.")
                expected = left[name] if name == original else left[original] - start[original]
                assert torch.equal(tensor, expected), name
            assert all(len(value) <= 2 for value in reply.content["metrics"].values())
            assert not any(isinstance(value, bytes) for value in reply.content["config"].values())


def test_the_shared_part_is_the_average_by_examples(run):
    """Whatever the method: θ ← Σ n_i θ_i / Σ n_i over the clients that took part, and that is what is sent next."""
    size = run.schema("shared").size
    for server_round in range(1, T + 1):
        exchanges = run.messages("train", server_round)
        weights = [len(toy_data(asked(m)[0]).train) for m, _ in exchanges]
        parts = [r.content["arrays"]["flat"].numpy()[:size].astype(np.float64) for _, r in exchanges]
        mean = np.average(parts, axis=0, weights=weights)
        following = run.messages("train", server_round + 1) if server_round < T else run.messages("evaluate", T)
        assert len(following) == N
        for message, _ in following:
            np.testing.assert_allclose(message.content["arrays"]["flat"].numpy()[:size], mean, rtol=1e-6, atol=1e-7)
    assert sorted(run.result.arrays) == sorted(row_of(run.variant).averaged)


# --- what stays, and what is used ------------------------------------------------------------------------------------


def test_what_stays_on_disk_is_what_the_table_says_as_training_left_it(run):
    for server_round in (T - 1, T):
        for client in range(N):
            kept = run.kept(client, server_round)
            assert sorted(kept) == sorted(row_of(run.variant).personal)
            assert all(torch.equal(t, run.trained[server_round, client].left[name]) for name, t in kept.items())


def starting_point(run, client, message):
    """All that a client has when a message has arrived: what it was sent, in its place, and what it had kept."""
    (version,) = message.content["config"]["versions"]
    shared, down = run.sent(message)
    left = run.trained[version, client].left if (version, client) in run.trained else run.kept(client, version)
    kept = {name: left[name] for name in row_of(run.variant).personal if name in left}
    start = start_of(run.variant, client)
    tensors = {**start, **shared, **kept}
    if run.variant[0] == "fedpac":
        tensors |= {name: t for name, t in down.items() if name in HEADS}
    if run.variant[0] == "cafedistill" and build(run.variant).write_back:
        tensors |= down
    if run.variant[0] == "cafedistill-plus":
        share = mixture_share(client)
        for name, t in down.items():
            of_class = share.reshape(-1, *(1 for _ in t.shape[1:]))
            tensors[name] = of_class * t + (1 - of_class) * kept[name]
    if run.variant[0] == "cafedistill-prior" and down:
        tensors |= {name: (kept["own." + name] + shared[name]) / 2 for name in BACKBONE}
    if run.variant[0] in ("pfedgraph", "cafedistill-prior"):
        tensors |= {n.removeprefix("update."): start[n.removeprefix("update.")] + t for n, t in down.items()}
    return tensors


def mixture_share(client):
    """κ/(κ + n_c + n/C) of a toy client's classes, κ = 10: how far the mixture takes its own classifier's place."""
    labels = toy_data(client).train.y
    return 10 / (10 + torch.bincount(labels, minlength=CLASSES) + len(labels) / CLASSES)


def personal_network(run, tensors):
    """The network a client uses, under the network's names."""
    own = {name.removeprefix("personal."): t for name, t in tensors.items() if name.startswith("personal.")}
    if run.variant[0] == "ditto":
        return own
    network = {name: tensors[name] for name in NETWORK}
    return network | {name: network[name] + t for name, t in own.items()}


def log_shares(client):
    """log π of a toy client: class shares with 0.1 imaginary examples of every class."""
    counts = np.bincount(toy_data(client).train.y, minlength=CLASSES) + 0.1
    return torch.from_numpy(np.log(counts / counts.sum())).float()


def offset_of(variant, client):
    return log_shares(client) if build(variant).prior else torch.zeros(CLASSES)


def loaded(tensors):
    network = toy_network(exits=2)
    network.load_state_dict(tensors)
    return network


@pytest.mark.slow
def test_a_client_goes_on_from_what_it_was_sent_and_what_it_kept(run):
    """Training finds the shared part of the message, and personal tensors where the last round left them; methods
    that send a client something of its own put it in its place."""
    for server_round in range(1, T + 1):
        for message, _ in run.messages("train", server_round):
            (client,) = asked(message)
            found = run.trained[server_round, client].found
            for name, tensor in starting_point(run, client, message).items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def test_what_is_evaluated_is_the_personal_network(run):
    """Before and after local training: the network the table gives, with log π added to the logits where asked for."""
    for message, _ in run.messages("train", T):
        (client,) = asked(message)
        (report,) = (r for r in run.notes.records[T].reports if r.client == client)
        for tensors, reported in (
            (starting_point(run, client, message), report.before),
            (run.trained[T, client].left, report.after),
        ):
            network = loaded(personal_network(run, tensors))
            network.offset = offset_of(run.variant, client)
            measured = evaluate(network, toy_data(client).test)
            assert reported.accuracy == measured.accuracy
            assert reported.loss == pytest.approx(measured.loss, rel=1e-5)


def test_the_published_network_is_the_personal_one_and_gives_the_accuracies_reported(run):
    """A plain network loaded from client-k.safetensors, with nothing added, has the final report's numbers."""
    assert [r.client for r in run.notes.reports] == list(range(N))
    for report, (message, _) in zip(run.notes.reports, run.messages("evaluate", T), strict=True):
        assert asked(message) == [report.client]
        published = run.published[report.client]
        assert {name: tuple(t.shape) for name, t in published.items()} == {name: SHAPES[name] for name in NETWORK}
        measured = evaluate(loaded(published), toy_data(report.client).test)
        assert measured.accuracy == report.exits.accuracy
        assert measured.loss == pytest.approx(report.exits.loss, rel=1e-5)
        metadata = strict_json((run.folder / "personal" / f"client-{report.client}.json").read_text())
        assert metadata["accuracy_per_exit"] == report.exits.accuracy
        assert metadata["method"] == run.variant[0]
        if run.variant[0] == "fedbabu":  # fine-tuned before it is published
            continue
        expected = personal_network(run, starting_point(run, report.client, message))
        for name in ("exits.0.head.bias", "exits.1.head.bias"):
            expected[name] = expected[name] + offset_of(run.variant, report.client)
        for name, tensor in published.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.slow
@plain_methods
def test_with_the_switches_every_method_runs_and_the_prior_is_log_pi_exactly(tmp_path, variant):
    """`prior` adds log π_i to the logits of client i's personal network at every exit, no more and no less: the
    published network has it in its biases. `distill` changes what is learned."""
    name = variant[0]
    off = quietly(tmp_path / "off", (name, {"prior": False}), N, rounds=2, num_rounds=2)
    switched = {switch for switch in ("prior", "distill") if (name, switch) not in REFUSED}
    for switch in switched:
        on = quietly(tmp_path / switch, (name, {"prior": False, switch: True}), N, rounds=2, num_rounds=2)
        for client in range(N):
            assert not same_tensors(on.published[client], off.published[client])
        if switch == "distill" or name == "fedbabu":
            continue
        for message, _ in on.messages("evaluate", 2):
            (client,) = asked(message)
            network = loaded(personal_network(on, starting_point(on, client, message)))
            x = toy_data(client).test.x
            with torch.no_grad():
                for z, published in zip(network(x), loaded(on.published[client])(x), strict=True):
                    torch.testing.assert_close(published - z, log_shares(client).expand_as(z), rtol=0, atol=1e-5)


# --- local steps -----------------------------------------------------------------------------------------------------


def test_all_methods_take_the_same_number_of_steps(run):
    for record in run.notes.records.values():
        assert [r.local_steps for r in record.reports] == [BUDGET.steps] * N


@pytest.mark.slow
@plain_methods
@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (LocalBudget(batch_size=8, steps=3, learning_rate=0.1), [3, 3, 3, 3]),
        (LocalBudget(batch_size=8, epochs=2, learning_rate=0.1), [3, 5, 6, 7]),  # 24, 34, 44, 54 draws
    ],
    ids=["steps", "epochs"],
)
def test_the_number_of_steps_is_the_budget_or_twice_that_as_published(tmp_path, variant, budget, expected):
    """With equal-steps all methods take as many; without, those that train two things take all for each."""
    for equal in (True, False):
        variant = (variant[0], {"equal_steps": equal})
        done = quietly(tmp_path / str(equal), variant, rounds=1, local=budget)
        times = 2 if variant[0] in TWO_PHASES and not equal else 1
        assert [r.local_steps for r in done.notes.records[1].reports] == [times * steps for steps in expected]


@pytest.mark.parametrize("name", sorted(TWO_PHASES))
def test_a_client_with_a_single_batch_still_trains_both_things(name):
    """One epoch of all its examples at once is one step, which two phases cannot share: neither may go without."""
    method, network = METHODS[name](), toy_network(exits=2)
    network.load_state_dict(initial())
    task = LocalTask(
        network=network,
        data=toy_data(1).train,
        active=[True],
        download={},
        budget=LocalBudget(batch_size=99, epochs=1, learning_rate=0.1),
        rng=lambda purpose: rng_for(0, 1, 1, purpose),
        state=method.extra_tensors(network),
        initial=initial(),
    )
    method.train(task)
    trained = {**network.state_dict(), **task.state}
    of_networks = {name: name.removeprefix("personal.") for name in trained}
    assert [n for n, name in of_networks.items() if name in NETWORK and torch.equal(trained[n], initial()[name])] == []


@pytest.mark.slow
@plain_methods
def test_steps_after_the_last_round_are_fine_tuning_and_are_counted(tmp_path, variant):
    """FedBABU: 5 rounds' worth unless told otherwise. The others: none."""
    for settings, rounds in [({}, 5), ({"finetune_rounds": 2}, 2)] if variant[0] == "fedbabu" else [({}, 0)]:
        done = quietly(tmp_path / str(rounds), (variant[0], settings), rounds=1, num_rounds=1)
        assert build((variant[0], settings)).extra_rounds() == rounds
        assert [r.local_steps for r in done.notes.reports] == [rounds * BUDGET.steps] * N


# --- what does not matter --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_neither_the_grouping_of_clients_on_nodes_nor_what_a_process_did_before_matters(tmp_path, run):
    """Three nodes, {0, 3}, {1} and {2}, in a process that has run the method with other settings, are four fresh ones
    of one client each, bit for bit."""
    app = toy_app(build=lambda: toy_network(exits=2))
    quietly(tmp_path / "before", (run.variant[0], {"equal_steps": False}), N, rounds=2, app=app)
    grouped = federate(tmp_path / "then", run.variant, num_nodes=3, app=app)
    assert_same_outcome(grouped, run)
    for client in range(N):
        assert same_tensors(grouped.kept(client, T), run.kept(client, T))
    for server_round in range(1, T + 1):
        reports = (done.notes.records[server_round].reports for done in (grouped, run))
        for a, b in zip(*reports, strict=True):
            assert (a.client, a.before, a.after, a.train_loss) == (b.client, b.before, b.after, b.train_loss)
            assert a.upload.tobytes() == b.upload.tobytes()


@pytest.mark.slow
@plain_methods
def test_another_seed_gives_other_personal_networks(tmp_path, variant):
    options = {"rounds": 1, "num_rounds": 1, "num_clients": 2}
    runs = [quietly(tmp_path / str(seed), variant, seed=seed, **options) for seed in (7, 8)]
    for client in range(2):
        assert not same_tensors(runs[0].published[client], runs[1].published[client])


@pytest.mark.slow
@some_variants
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, variant):
    """2 + 2 rounds are 4, with partial participation and a checkpoint on disk in between."""
    options = {"fraction_train": 0.6, "min_train_nodes": 2}
    whole = quietly(tmp_path / "whole", variant, **options)
    first = quietly(tmp_path / "parts", variant, rounds=2, **options)
    state = first.notes.checkpoints.load()
    assert state.round == 2
    resumed = quietly(tmp_path / "parts", variant, resume_from=state, **options)
    assert_same_outcome(resumed, whole)
    for server_round in (3, 4):
        a, b = whole.notes.records[server_round], resumed.notes.records[server_round]
        assert a.participants == b.participants
        np.testing.assert_array_equal(a.plan.active, b.plan.active)
        for r, s in zip(a.reports, b.reports, strict=True):
            assert (r.similarity, r.train_loss) == (s.similarity, s.train_loss)
            assert r.upload.tobytes() == s.upload.tobytes()
            assert same_tensors(whole.kept(r.client, server_round), resumed.kept(r.client, server_round))


# --- who is there, and what goes wrong -------------------------------------------------------------------------------


@pytest.fixture
def coming_and_going(monkeypatch):
    """Client 3 is away in rounds 2 and 3, client 0 in rounds 1 and 3."""
    participants = {1: [1, 2, 3], 2: [0, 1, 2], 3: [1, 2], 4: [0, 1, 2, 3]}
    monkeypatch.setattr(FederatedStrategy, "sample", lambda self, server_round, *_: participants[server_round])
    return participants


@pytest.mark.slow
@some_variants
def test_absent_clients_neither_stop_the_run_nor_change(tmp_path, coming_and_going, variant):
    """A client comes back with the personal state it left with; one may come for the first time in any round, which
    can be recorded although the new one is nobody's teacher yet."""
    done = quietly(tmp_path, variant, num_nodes=N)
    for server_round, clients in coming_and_going.items():
        record = done.notes.records[server_round]
        assert [r.client for r in record.reports] == clients
        assert record.plan.active.shape == (len(clients), 1)
        assert set(record.plan.downloads) <= set(clients)
        assert all(np.isfinite(values).all() for values in record.plan.downloads.values())
    versions = {c: m.content["config"]["versions"] for m, _ in done.messages("train", T) for c in asked(m)}
    assert versions == {0: [2], 1: [3], 2: [3], 3: [1]}
    files = sorted(p.name for p in (tmp_path / "personal" / "versions").glob("*/client-3/*"))
    assert files == ["round-000001.safetensors", "round-000004.safetensors"]
    assert [r.client for r in done.notes.reports] == list(range(N))
    for server_round, record in done.notes.records.items():
        assert record.line()
        assert strict_json(to_json(record.to_json()))["participants"] == coming_and_going[server_round]


@pytest.mark.slow
@some_variants
def test_clients_that_fail_are_left_out_and_the_others_go_on(tmp_path, variant):
    """Two nodes, {0, 2} and {1, 3}. Client 3 trains on what is no number: it is left out in every round, its
    neighbour is not. The other node raises in round 2 and sends an array of NaN in round 3: nothing of it reaches
    anybody, and in round 4 its clients start from what they last reported well."""

    def load(client):
        data = toy_data(client)
        return replace(data, augment=lambda x, rng: x * torch.nan) if client == 3 else data

    def fault(answer, message, context):
        if message.metadata.message_type != "train" or asked(message) != [0, 2]:
            return answer(message, context)
        server_round = message.content["config"]["server-round"]
        if server_round == 2:
            raise RuntimeError("out of memory")
        reply = answer(message, context)
        if server_round == 3:
            flat = reply.content["arrays"]["flat"].numpy()
            broken = np.full(4 * flat.size, 0xFF, dtype=np.uint8).view(np.float32)  # NaN, in double precision too
            reply.content["arrays"] = ArrayRecord({"flat": Array(broken)})
        return reply

    app = FaultyApp(toy_app(load, lambda: toy_network(exits=2)), fault)
    done = quietly(tmp_path, variant, app=app)
    sends_nothing = not [*row_of(variant).averaged, *row_of(variant).up]  # and so no NaN either
    left_out = [list(done.notes.records[t].left_out) for t in range(1, T + 1)]
    assert left_out == [[3], [0, 2, 3], [3] if sends_nothing else [0, 2, 3], [3]]
    assert "NaN" in done.notes.records[1].left_out[3]
    for message, _ in done.grid.of_type("train"):
        assert np.isfinite(message.content["arrays"]["flat"].numpy()).all()
    (again,) = (m for m, _ in done.messages("train", T) if asked(m) == [0, 2])
    assert again.content["config"]["versions"] == ([3, 3] if sends_nothing else [1, 1])
    assert all(np.isfinite(array.numpy()).all() for array in done.result.arrays.values())
    assert {0, 1, 2} <= {r.client for r in done.notes.reports}
    for client, tensors in done.published.items():
        assert all(torch.isfinite(t).all() for t in tensors.values()), f"client {client}"


@pytest.mark.slow
@plain_methods
def test_a_client_that_comes_later_gets_on(tmp_path, variant):
    """The device of client 2 registers before round 2: it trains from then on and has a network at the end."""
    grid = DeviceGrid(
        toy_app(build=lambda: toy_network(exits=2)), ["0", "1", "2"], tmp_path / "personal", {2: (2, math.inf)}
    )
    done = quietly(tmp_path, variant, grid=grid, rounds=3, num_rounds=3, num_clients=None)
    took_part = [[r.client for r in done.notes.records[t].reports] for t in (1, 2, 3)]
    assert took_part == [[0, 1], [0, 1, 2], [0, 1, 2]]
    assert [r.client for r in done.notes.reports] == [0, 1, 2]
    assert sorted(done.published) == [0, 1, 2]


@pytest.mark.slow
@some_variants
def test_a_single_client_with_a_single_class_is_enough(tmp_path, variant):
    """Nobody to learn from, and classes that nobody has: all numbers stay finite."""

    def load(client):
        data = toy_data(client)
        return ClientData(*(Split(s.x, torch.zeros_like(s.y)) for s in (data.train, data.calibration, data.test)))

    done = quietly(tmp_path, variant, 1, app=toy_app(load, lambda: toy_network(exits=2)), num_clients=1)
    assert [[r.client for r in done.notes.records[t].reports] for t in range(1, T + 1)] == [[0]] * T
    assert all(torch.isfinite(t).all() for t in done.published[0].values())
    for record in done.notes.records.values():
        if record.plan.weights is not None:
            np.testing.assert_allclose(record.plan.weights, [[1.0]])


@pytest.mark.slow
@some_variants
def test_a_network_with_a_single_exit_works_or_is_refused_before_the_first_round(tmp_path, variant):
    """DepthFL's exits teach one another: it needs two, and says so."""
    if variant[0] == "depthfl":
        with pytest.raises(ValueError, match="at least 2 exits"):
            build(variant).check(toy_network(exits=1))
        with pytest.raises(RuntimeError, match="at least 2 exits"):
            federate(tmp_path, variant, exits=1)
        assert not (tmp_path / "checkpoint").exists()
        return
    done = quietly(tmp_path, variant, rounds=2, num_rounds=2, exits=1)
    assert [len(r.exits.accuracy) for r in done.notes.reports] == [1] * N
    assert all(np.isfinite(r.train_loss) for record in done.notes.records.values() for r in record.reports)


@pytest.mark.slow
@own_variants
def test_every_setting_runs_at_other_values(tmp_path, variant):
    """Two rounds, the last of which all clients enter with a download of their own: finite networks come out."""
    done = quietly(tmp_path, variant, rounds=2, num_rounds=2, num_clients=2)
    assert [r.client for r in done.notes.reports] == [0, 1]
    for tensors in done.published.values():
        assert all(torch.isfinite(t).all() for t in tensors.values())


# --- the two halves by themselves ------------------------------------------------------------------------------------


def knowledge(method, clients, participants=(1, 4, 9), exits=2, *, reverse=False):
    """A round for the server half, with random reports of the clients."""
    network, rng = toy_network(exits), np.random.default_rng(0)
    tensors = {**network.state_dict(), **method.extra_tensors(network)}
    schema = Schema.of(tensors, method.upload_names(network))
    known = {}
    for c in sorted(clients):
        sent = {name: torch.from_numpy(rng.normal(size=tensors[name].shape)).float() for name in schema.names}
        for name in {"class-counts", "variance"} & set(sent):
            sent[name] = sent[name].abs()
        known[c] = ClientRecord(int(rng.integers(5, 50)), 3, schema.pack(sent), rng.uniform(-1, 1, size=exits - 1))
    if reverse:
        known = dict(reversed(known.items()))
    return ServerRound(4, 20, participants, exits, known, schema, np.random.default_rng(1))


@pytest.mark.slow
@every_method
def test_a_plan_is_for_the_participants_in_their_order(name):
    """Whoever is known: none of them, one, all, or only others. Weights are shares."""
    for variant in of_method(name):
        method = build(variant)
        for exits in (2, 5):
            network = toy_network(exits)
            tensors = {**network.state_dict(), **method.extra_tensors(network)}
            size = Schema.of(tensors, method.download_names(network)).size
            for reported in ([], [4], [1, 4, 9], [2, 3]):
                plan = method.plan(knowledge(method, reported, exits=exits))
                assert plan.active.shape == (3, exits - 1)
                assert plan.active.dtype == bool
                assert set(plan.downloads) <= {1, 4, 9}
                for values in plan.downloads.values():
                    assert values.shape == (size,)
                    assert values.dtype == np.float32
                    assert np.isfinite(values).all()
                if plan.weights is not None:
                    assert plan.weights.shape == (len(plan.weight_rows), len(plan.weight_columns))
                    assert set(plan.weight_rows) <= {1, 4, 9}
                    np.testing.assert_allclose(plan.weights.sum(axis=1), 1.0, atol=1e-6)
                    assert (plan.weights >= 0).all()


@pytest.mark.slow
@every_method
def test_a_plan_does_not_depend_on_the_order_of_what_is_known_and_changes_none_of_it(name):
    for variant in of_method(name):
        method = build(variant)
        rounds = [knowledge(method, range(5), (0, 1, 3), reverse=reverse) for reverse in (False, True)]
        before = {c: (r.upload.copy(), r.similarity.copy()) for c, r in rounds[0].known.items()}
        a, b = (method.plan(one) for one in rounds)
        np.testing.assert_array_equal(a.active, b.active)
        assert list(a.downloads) == list(b.downloads)
        for client, values in a.downloads.items():
            np.testing.assert_array_equal(values, b.downloads[client])
        for client, (upload, similarity) in before.items():
            np.testing.assert_array_equal(rounds[0].known[client].upload, upload)
            np.testing.assert_array_equal(rounds[0].known[client].similarity, similarity)


@pytest.mark.slow
@every_method
def test_what_is_concluded_is_of_those_who_reported_and_changes_nothing_else(name):
    """Of three participants two report, one of them for the first time: what the server keeps of them is finite and of
    the size sent, levels are those of exits there are, weights are shares, and the order of reports does not matter."""
    for variant in of_method(name):
        method = build(variant)
        for exits in (1, 2, 5):
            task = knowledge(method, [1, 4, 9], exits=exits)
            came = {client: task.known[client] for client in (4, 9)}
            task = replace(task, known={4: knowledge(method, [4], exits=exits).known[4]})
            before = {client: record.upload.copy() for client, record in came.items()}
            old = task.known[4].upload.copy()
            plan = method.plan(task)
            one, other = (method.conclude(task, plan, dict(order)) for order in (came.items(), [*came.items()][::-1]))
            assert set(one.records) == {4, 9}
            assert set(one.unmoved) <= {4, 9}
            for client, record in one.records.items():
                assert record.upload.shape == before[client].shape
                assert np.isfinite(record.upload).all()
                assert 0 <= record.level <= max(exits - 2, 0)
                assert record.num_examples == came[client].num_examples
                np.testing.assert_array_equal(record.upload, other.records[client].upload)
                np.testing.assert_array_equal(came[client].upload, before[client])
            np.testing.assert_array_equal(task.known[4].upload, old)
            assert one.plan.active.tolist() == plan.active.tolist()
            if one.plan.weights is not None:
                assert one.plan.weights.shape == (len(one.plan.weight_rows), len(one.plan.weight_columns))
                np.testing.assert_allclose(one.plan.weights.sum(axis=1), 1.0, atol=1e-6)
            np.testing.assert_array_equal(one.pairs.among([1, 4, 9]), other.pairs.among([1, 4, 9]))
            assert not task.pairs.among([1, 4, 9]).any()


@pytest.mark.slow
@every_method
def test_training_is_repeatable_and_leaves_the_network_trainable(name):
    """The same start and generator give the same outcome bit for bit; nothing stays frozen, the backbone has moved: all
    of it, but for the deepest student's projection where only distillation would train it, and there is none."""
    for variant in of_method(name):
        method, outcomes = build(variant), []
        only_taught = name in ("cafedistill", "cafedistill-plus") and not method.distill_weight
        untrained = [key for key in PROJECTIONS if only_taught and key.startswith("exits.0")]
        for _ in range(2):
            network = toy_network(exits=2)
            network.load_state_dict(initial())
            task = LocalTask(
                network=network,
                data=toy_data(1).train,
                active=[True],
                download={},
                budget=BUDGET,
                rng=lambda purpose: rng_for(0, 1, 1, purpose),
                private_rng=lambda purpose: rng_for(0, 0, 1, purpose),
                state=method.extra_tensors(network),
                initial=initial(),
            )
            result = method.train(task)
            assert np.isfinite(result.loss)
            assert all(-1.001 <= s <= 1.001 for s in result.similarity)
            assert all(p.requires_grad for p in network.parameters())
            tensors = {**network.state_dict(), **task.state}
            assert not any(t.requires_grad for t in task.state.values())
            assert [key for key in BACKBONE if torch.equal(tensors[key], initial()[key])] == untrained
            outcomes.append((result, tensors))
        assert outcomes[0][0] == outcomes[1][0]
        assert same_tensors(outcomes[0][1], outcomes[1][1])


# --- the example of docs/methods.md ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_of_the_documentation_is_a_method_that_works(tmp_path, monkeypatch):
    """As it is printed: classifiers are sent up, their average by examples comes down, and it pulls. Without a pull it
    is FedPer, bit for bit."""
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class FedNear" in block)
    example = {"__name__": "fednear"}
    exec(code, example)
    monkeypatch.setitem(METHODS, "fednear", example["FedNear"])
    network = toy_network(exits=2)
    assert settings_of(METHODS["fednear"]())["pull"] == 0.1
    with pytest.raises(ValueError, match="pull must be at least 0"):
        METHODS["fednear"](pull=-1.0)
    assert METHODS["fednear"]().upload_names(network) == METHODS["fednear"]().download_names(network) == HEADS

    def three_rounds(name, **settings):
        folder = tmp_path / " ".join([name, *map(str, settings.values())])
        return quietly(folder, (name, settings), rounds=3, num_rounds=3, num_nodes=N)

    near = three_rounds("fednear")
    assert [r.client for r in near.notes.reports] == list(range(N))
    weights = [len(toy_data(client).train) for client in range(N)]
    for server_round in (1, 2, 3):
        assert [asked(m) for m, _ in near.messages("train", server_round)] == [[c] for c in range(N)]
        downloads = [near.sent(message)[1] for message, _ in near.messages("train", server_round)]
        if server_round == 1:
            assert downloads == [{}] * N
            continue
        reports = near.notes.records[server_round - 1].reports
        sent = [near.schema("upload").unpack(report.upload) for report in reports]
        for down in downloads:
            assert sorted(down) == sorted(HEADS)
            for name, tensor in down.items():
                mean = np.average([heads[name].numpy() for heads in sent], axis=0, weights=weights)
                np.testing.assert_allclose(tensor, mean, rtol=1e-5, atol=1e-6)

    def spread(run):
        heads = torch.stack([torch.cat([t[name].flatten() for name in HEADS]) for t in run.published.values()])
        return (heads - heads.mean(0)).norm().item()

    free, fedper = three_rounds("fednear", pull=0.0), three_rounds("fedper")
    assert_same_outcome(free, fedper)
    assert spread(three_rounds("fednear", pull=3.0)) < spread(near) < spread(free)


# --- what docs/methods.md says of them -------------------------------------------------------------------------------


def test_the_documentation_has_a_row_for_every_method():
    """With the file it is in."""
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    rows = re.findall(r"^\| \[`([a-z-]+)`\]\(\.\./(\S+)\)", text, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(METHODS)
    for name, path in rows:
        assert METHODS[name].__module__.replace(".", "/") + ".py" == path
