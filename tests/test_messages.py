"""The wire: what is written is what is read, to the bit, and what does not fit is refused in words."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe_flwr.core.schema import Schema, schema_hash
from cafe_flwr.core.text import kebab
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.metrics import DynamicCounts, ExitMetrics
from cafe_flwr.training import LocalBudget
from cafe_flwr.wire.averaging import weighted
from cafe_flwr.wire.codec import method_config, prefixed
from cafe_flwr.wire.describe import NodeInfo
from cafe_flwr.wire.evaluate import FinalReport
from cafe_flwr.wire.keys import PHASES, Keys
from cafe_flwr.wire.reports import ClientReport
from cafe_flwr.wire.train import Expected, TrainReply, TrainRequest


@pytest.fixture(autouse=True, scope="module")
def _flower():
    """Flower makes no message outside of an engine."""
    InProcessGrid(lambda message, context: message, 1)


OTHER_KEYS = Keys(arrays="model", config="orders", weight="samples")


def delivered(content):
    """A message as it arrives at the other side, through Flower's own serialisation."""
    wire = recorddict_to_proto(content).SerializeToString()
    return Message(recorddict_from_proto(RecordDictProto.FromString(wire)), 5, "train")


# --- schema ---

SCHEMA = Schema((("a.weight", (2, 3)), ("a.bias", (2,)), ("scale", ())))


def tensors():
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([7.0, 8.0]), "scale": torch.tensor(9.0)}


def test_packing_is_in_the_order_of_the_schema_and_back():
    """Row by row, name by name, whatever the order of the dictionary; other tensors are left alone."""
    flat = SCHEMA.pack({"other": torch.ones(4), **dict(reversed(tensors().items()))})
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert flat.dtype == np.float32
    back = SCHEMA.unpack(flat)
    assert list(back) == SCHEMA.names
    for name, tensor in tensors().items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == torch.float32


@settings(deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=5), seed=st.integers(0, 10**6))
def test_any_tensors_survive_bit_for_bit(shapes, seed):
    rng = np.random.default_rng(seed)
    named = {f"t{i}": torch.from_numpy(np.asarray(rng.normal(size=s), dtype=np.float32)) for i, s in enumerate(shapes)}
    schema = Schema.of(named, list(named))
    flat = schema.pack(named)
    assert flat.shape == (schema.size,) == (sum(t.numel() for t in named.values()),)
    if schema.entries:
        back = schema.unpack(flat)
        assert all(
            torch.equal(back[name], tensor) and back[name].shape == tensor.shape for name, tensor in named.items()
        )
    assert Schema.from_json(schema.to_json()) == schema


def test_what_does_not_fit_a_schema_is_refused():
    with pytest.raises(ValueError, match=r"missing tensors: a\.bias, scale"):
        SCHEMA.pack({"a.weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"a\.weight must have shape \(2, 3\), got \(3, 2\)"):
        SCHEMA.pack({**tensors(), "a.weight": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"expected 9 values, got an array of shape \(8,\)"):
        SCHEMA.unpack(np.zeros(8, dtype=np.float32))
    with pytest.raises(ValueError, match=r"expected 9 values, got an array of shape \(9, 1\)"):
        SCHEMA.unpack(np.zeros((9, 1), dtype=np.float32))
    for broken in (np.nan, np.inf):
        flat = np.zeros(9, dtype=np.float32)
        flat[[2, 5]] = broken
        with pytest.raises(ValueError, match="2 of 9 values are NaN or infinite"):
            SCHEMA.unpack(flat)


def test_what_is_unpacked_is_its_own_copy():
    flat = SCHEMA.pack(tensors())
    back = SCHEMA.unpack(flat)
    flat[:] = -1
    assert torch.equal(back["a.weight"], tensors()["a.weight"])


def test_the_digest_tells_names_shapes_order_and_kind_apart():
    schemas = [
        (SCHEMA,),
        (Schema(SCHEMA.entries[:2]),),
        (Schema(SCHEMA.entries[::-1]),),
        (Schema((("a.weight", (3, 2)), *SCHEMA.entries[1:])),),
        (Schema((("b.weight", (2, 3)), *SCHEMA.entries[1:])),),
        (Schema(SCHEMA.entries[:1]), Schema(SCHEMA.entries[1:])),
        (Schema(SCHEMA.entries[1:]), Schema(SCHEMA.entries[:1])),
        (SCHEMA, Schema(())),
        (Schema(()), SCHEMA),
    ]
    assert len({schema_hash(*s) for s in schemas}) == len(schemas)
    assert schema_hash(SCHEMA) == schema_hash(Schema.from_json(SCHEMA.to_json()))


# --- who are you? ---


def node_info(**changes):
    info = NodeInfo(
        version="1.2.3",
        clients=[3, 5],
        num_examples=[10, 20],
        problems=["client 7 is left out: no data"],
        num_nodes=4,
        digest="abc",
        shared=SCHEMA,
        upload=Schema(SCHEMA.entries[:1]),
        download=Schema(()),
        num_exits=3,
        num_parameters=99,
        macs=[1, 2, 3],
    )
    return replace(info, **changes)


@pytest.mark.parametrize("keys", [Keys(), OTHER_KEYS])
@pytest.mark.parametrize("changes", [{}, {"clients": [], "num_examples": [], "problems": []}, {"name": "ward 7"}])
def test_a_nodes_answer_survives(keys, changes):
    info = node_info(**changes)
    assert NodeInfo.from_message(delivered(info.to_content(keys)), keys) == info


def test_a_nodes_answer_that_lacks_something_is_refused():
    content = node_info().to_content(Keys())
    for name in [kebab(f.name) for f in fields(NodeInfo)]:
        if name in ("clients", "num-examples", "problems", "name", "kinds", "kind-of"):  # not sent if empty
            continue
        config = dict(content["config"])
        del config[name]
        with pytest.raises(ValueError, match=f"answered without {name}"):
            NodeInfo.from_message(delivered(RecordDict({"config": ConfigRecord(config)})), Keys())


def test_a_nodes_answer_of_another_protocol_is_refused():
    content = node_info().to_content(Keys())
    content["config"]["protocol"] = 99
    with pytest.raises(ValueError, match=r"speaks message protocol 99, this server speaks .*same version"):
        NodeInfo.from_message(delivered(content), Keys())


# --- what a node is asked ---

SHARED, DOWN, UP = 11, 5, 4


def request(clients=(2, 4, 7), downloads=(4, 7), students=2, **changes):
    rng = np.random.default_rng(0)
    values = {
        "run": "ab" * 8,
        "seed": 3,
        "digest": "abc",
        "server_round": 6,
        "num_rounds": 9,
        "resumable_from": 4,
        "clients": list(clients),
        "versions": [5] * len(clients),
        "active": rng.random((len(clients), students)) < 0.5,
        "shared": rng.normal(size=SHARED).astype(np.float32),
        "downloads": {c: rng.normal(size=DOWN).astype(np.float32) for c in (*downloads, 99)},
        "method": "cafedistill",
        "method_settings": {"mu": 0.25, "solver": "exact", "max_staleness": 3},
        "budget": LocalBudget(batch_size=7, epochs=2, learning_rate=0.125, momentum=0.5),
    }
    return TrainRequest(**{**values, **changes})


@pytest.mark.parametrize("keys", [Keys(), OTHER_KEYS])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clients": (2,), "downloads": ()},
        {"clients": (0,), "downloads": (0,)},
        {"students": 0},
        {"students": 1},
        {"evaluate": False},
    ],
)
def test_a_request_survives(keys, changes):
    """To the bit, and nothing of clients that are not asked travels."""
    sent = request(**changes)
    got = TrainRequest.from_message(
        delivered(sent.to_content(keys, {"user": "own"})), keys, shared_size=SHARED, download_size=DOWN
    )
    for f in fields(TrainRequest):
        a, b = getattr(sent, f.name), getattr(got, f.name)
        if f.name == "downloads":
            assert sorted(b) == [c for c in sent.clients if c in changes.get("downloads", (4, 7))]
            for client, values in b.items():
                assert values.tobytes() == a[client].tobytes()
        elif isinstance(a, np.ndarray):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()
        else:
            assert a == b, f.name


def test_a_users_own_config_travels_along_and_does_not_overrule():
    content = request().to_content(Keys(), {"lr": 0.5, "seed": 99})
    assert (content["config"]["lr"], content["config"]["seed"]) == (0.5, 3)


def test_a_request_of_another_size_is_refused_on_the_node():
    content = request().to_content(Keys(), {})
    size = SHARED + 2 * DOWN
    for shared_size, download_size in ((SHARED + 1, DOWN), (SHARED, DOWN + 1), (SHARED, 0)):
        wanted = shared_size + 2 * download_size
        with pytest.raises(ValueError, match=f"the request carries {size} values, this node's network needs {wanted}"):
            TrainRequest.from_message(delivered(content), Keys(), shared_size=shared_size, download_size=download_size)


def test_a_request_that_is_none_is_refused_on_the_node():
    sizes = {"shared_size": SHARED, "download_size": DOWN}
    with pytest.raises(ValueError, match="needs a ConfigRecord named 'config', found nothing"):
        TrainRequest.from_message(delivered(RecordDict()), Keys(), **sizes)
    content = request().to_content(Keys(), {})
    with pytest.raises(ValueError, match="needs a ConfigRecord named 'orders', found 'arrays', 'config'"):
        TrainRequest.from_message(delivered(content), OTHER_KEYS, **sizes)
    del content["arrays"]
    with pytest.raises(ValueError, match="needs a ArrayRecord named 'arrays', found 'config'"):
        TrainRequest.from_message(delivered(content), Keys(), **sizes)
    content["config"]["protocol"] = 0
    with pytest.raises(ValueError, match="the server speaks message protocol 0, this node "):
        TrainRequest.from_message(delivered(content), Keys(), **sizes)


# --- what a node replies ---


def exit_values(rng, exits):
    return ExitMetrics(*(rng.random(exits).tolist() for _ in range(3)))


def report(client, exits=3, rng=None):
    rng = rng or np.random.default_rng(client)
    return ClientReport(
        client=client,
        num_examples=10 + client,
        test_examples=client,
        train_loss=float(rng.normal()),
        local_steps=3 * client + 1,
        similarity=rng.uniform(-1, 1, exits - 1).tolist(),
        before=exit_values(rng, exits),
        after=exit_values(rng, exits),
        seconds_train=0.5,
        seconds_evaluate=0.25,
        upload=rng.normal(size=UP).astype(np.float32),
    )


def reply(clients, failures=None, exits=3):
    reports = [report(c, exits) for c in clients]
    rng = np.random.default_rng(1)
    parts = [rng.normal(size=SHARED).astype(np.float32) for _ in clients]
    if len(clients) == 1:
        shared = parts[0]
    else:
        shared = sum((weighted(p, r.num_examples) for p, r in zip(parts, reports, strict=True)), np.zeros(SHARED))
    return TrainReply(4, "abc", shared, reports, failures or {})


def read(message, keys=None, exits=3, **changes):
    expected = {"digest": "abc", "shared_size": SHARED, "upload_size": UP, "num_exits": exits} | changes
    return TrainReply.from_message(message, keys or Keys(), Expected(**expected))


@pytest.mark.parametrize("keys", [Keys(), OTHER_KEYS])
@pytest.mark.parametrize("exits", [1, 3])
@pytest.mark.parametrize(
    ("clients", "failures"),
    [([3], {}), ([1, 5], {}), ([0, 2, 4], {3: "no, never", 9: "späßchen"}), ([2], {1: ""}), ([], {1: "a", 2: "b"})],
)
def test_a_reply_survives(keys, exits, clients, failures):
    """Every number, to the bit, for one client (float32) and for several (sums in float64)."""
    sent = reply(clients, failures, exits)
    got = read(delivered(sent.to_content(keys)), keys, exits)
    assert (got.server_round, got.digest, got.failures) == (sent.server_round, sent.digest, sent.failures)
    assert got.weight == sent.weight == sum(10 + c for c in clients)
    if clients:
        assert got.shared.dtype == (np.float32 if len(clients) == 1 else np.float64)
        assert got.shared.tobytes() == sent.shared.tobytes()
    for a, b in zip(sent.reports, got.reports, strict=True):
        assert a.upload.tobytes() == b.upload.tobytes()
        assert b.upload.dtype == np.float32
        assert replace(a, upload=0) == replace(b, upload=0)


def test_unknown_accuracies_survive():
    """NaN where a client has no test split, or was told not to evaluate."""
    unknown = replace(report(1), before=ExitMetrics(*[[float("nan")] * 3] * 3), test_examples=0)
    sent = replace(reply([1]), reports=[unknown])
    (got,) = read(delivered(sent.to_content(Keys()))).reports
    assert np.isnan(got.before.accuracy).all()
    assert got.after == unknown.after


def test_a_reply_of_several_clients_with_its_uploads_mixed_up_in_length_is_refused():
    message = delivered(reply([1, 2]).to_content(Keys()))
    for changes in ({"shared_size": SHARED + 1}, {"upload_size": UP + 1}, {"upload_size": 0}):
        with pytest.raises(ValueError, match=r"its array has .* values, expected "):
            read(message, **changes)
    with pytest.raises(ValueError, match="its metrics need 4 values of 'similarity', got "):
        read(delivered(reply([1, 2], exits=4).to_content(Keys())))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["first", "last of the sum", "head"])
def test_a_sum_that_is_not_a_number_is_refused(value, place):
    """In the sums, which travel as pairs of float32, as well as in the heads."""
    content = reply([1, 2]).to_content(Keys())
    flat = content["arrays"]["flat"].numpy().copy()
    if place == "head":
        flat[-1] = value
    else:
        flat[: 2 * SHARED].view(np.float64)[0 if place == "first" else -1] = value
    content["arrays"] = ArrayRecord({"flat": Array(flat)})
    with pytest.raises(ValueError, match=r"1 of the .*values in its array are NaN or infinite"):
        read(delivered(content))


@pytest.mark.parametrize(
    "key", ["num-examples", "test-examples", "train-loss", "local-steps", "seconds-train", "similarity"]
)
def test_a_reply_without_a_metric_is_refused_by_name(key):
    content = reply([1, 2]).to_content(Keys())
    metrics = dict(content["metrics"])
    del metrics[key]
    content["metrics"] = MetricRecord(metrics)
    with pytest.raises(ValueError, match=f"its metrics need . values of '{key}', got "):
        read(delivered(content))


def test_the_metrics_of_a_reply_are_few_and_named_by_phase():
    content = reply([1, 2]).to_content(Keys())
    expected = {"num-examples", "test-examples", "train-loss", "local-steps", "similarity"}
    expected |= {"seconds-train", "seconds-evaluate"}
    expected |= {f"{name}-{phase}" for name in ("accuracy", "loss", "ece") for phase in PHASES}
    assert set(content["metrics"]) == expected
    assert sum(record.count_bytes() for record in content.values()) < 1000


# --- the final evaluation ---


def final_report(exits=3):
    rng = np.random.default_rng(0)

    def counts():
        return DynamicCounts(
            rng.integers(0, 50, size=(102, exits)), rng.integers(0, 50, size=102), rng.integers(0, 50, size=102)
        )

    return FinalReport(
        client=4,
        train_examples=30,
        calibration_examples=8,
        test_examples=20,
        classes=5,
        local_steps=15,
        ensemble=0.625,
        exits=exit_values(rng, exits),
        adapted=exit_values(rng, exits),
        calibration=counts(),
        test=counts(),
    )


@pytest.mark.parametrize("exits", [1, 3])
def test_a_final_report_survives(exits):
    sent = final_report(exits)
    message = delivered(RecordDict({"client-4": sent.to_record()}))
    got = FinalReport.from_record(message.content["client-4"], exits)
    for f in fields(FinalReport):
        a, b = getattr(sent, f.name), getattr(got, f.name)
        if isinstance(a, DynamicCounts):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)
                assert y.dtype == np.int64
        else:
            assert a == b, f.name
            assert type(a) is type(b), f.name


def test_what_a_final_report_does_not_know_stays_unknown():
    """No log-prior that could be re-estimated; no test examples."""
    unknown = ExitMetrics.unknown(3)
    sent = replace(final_report(), ensemble=math.nan, exits=unknown, adapted=unknown)
    message = delivered(RecordDict({"client-4": sent.to_record()}))
    got = FinalReport.from_record(message.content["client-4"], 3)
    assert math.isnan(got.ensemble)
    for metrics in (got.exits, got.adapted):
        assert all(len(values) == 3 and np.isnan(values).all() for values in vars(metrics).values())
    assert got.local_steps == 15


# --- names ---


def test_names_of_settings_survive_both_ways():
    config = method_config("cafedistill", {"distill_weight": 0.5, "mu": 1.0})
    assert config == {"method": "cafedistill", "method.distill-weight": 0.5, "method.mu": 1.0}
    assert prefixed({**config, "other": 1, "methods.x": 2}, "method.") == {"distill_weight": 0.5, "mu": 1.0}
