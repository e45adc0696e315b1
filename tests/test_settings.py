"""Settings: the manifest's defaults are the library's, and what cannot be is refused by name, before anything runs."""

import math
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cafe_flwr import CafeDistill
from cafe_flwr.coordination import SELECTIONS
from cafe_flwr.core.text import kebab
from cafe_flwr.methods import METHODS, CafeDistillMethod, Method, settings_of
from cafe_flwr.methods.base import declared_settings
from cafe_flwr.methods.exit_agreement import PROXIES
from cafe_flwr.methods.starts import STARTS
from cafe_flwr.settings import Settings, keys_of_other_methods
from cafe_flwr.teaching import TEACHERS

ROOT = Path(__file__).parents[1]
DEFAULTS = Settings().to_run_config()


def test_the_manifest_has_every_setting_with_its_default_and_type():
    """`[tool.flwr.app.config]` is what `flwr run` starts from: keys, values and TOML types, in the order of `keys`."""
    manifest = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert manifest == DEFAULTS
    assert list(manifest) == Settings.keys()
    assert {key: type(value) for key, value in manifest.items()} == {k: type(v) for k, v in DEFAULTS.items()}


def test_names_are_kebab_case_and_values_are_what_flower_can_carry():
    assert sorted(Settings.keys()) == sorted(DEFAULTS)
    assert len(set(Settings.keys())) == len(Settings.keys())
    for key, value in DEFAULTS.items():
        assert key == key.lower().replace("_", "-")
        assert type(value) in (bool, int, float, str)


def test_every_setting_says_what_it_is_for():
    for field in Settings.model_fields.values():
        assert len(field.description) >= 7
        assert field.description.endswith(".")


def test_settings_survive_a_round_trip():
    changed = {
        "seed": 7,
        "mu": 0.25,
        "dataset": "local:/data/my set.parquet",
        "resume": True,
        "selection": "none",
        "local-epochs": 3,
        "results-dir": "/tmp/here",
    }
    settings = Settings.from_run_config(changed)
    assert Settings.from_run_config(settings.to_run_config()) == settings
    assert {key: settings.to_run_config()[key] for key in changed} == changed


def test_defaults_of_the_parts_are_those_of_the_settings():
    """Whoever builds a strategy in Python gets what the manifest would give."""
    method, budget = CafeDistillMethod(), CafeDistill().local
    assert settings_of(method) == {name: getattr(Settings(), name) for name in settings_of(method)}
    for name in ("batch_size", "learning_rate", "momentum", "weight_decay", "max_grad_norm", "keep_momentum"):
        assert getattr(budget, name) == getattr(Settings(), name)
    assert (budget.steps, budget.epochs) == (Settings().local_steps, Settings().local_epochs)


def keys_of(method):
    """Keys of the settings a method has not from every method, by the prefix of who declares them: itself, or the
    method that it is a variant of; and those that it has from every method."""
    cls, common = METHODS[method], set(declared_settings(Method))
    own = {f.name: f for f in fields(cls) if f.name not in common or f.name in cls.__annotations__}
    owners = {name: next(c for c in cls.__mro__ if name in vars(c).get("__annotations__", {})) for name in own}
    return {owners[name].prefix + kebab(name): f for name, f in own.items()}, common - set(own)


def keys_declared_by(method):
    """Those of them that it declares itself."""
    return {key: f for key, f in keys_of(method)[0].items() if f.name in METHODS[method].__annotations__}


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_every_method_is_a_key_under_its_prefix(method):
    """With the default, description and type of the method; unset, the method is as it is made in Python."""
    assert Settings.from_run_config({"method": method}).build_method() == METHODS[method]()
    own, common = keys_of(method)
    assert {kebab(name) for name in common} <= set(DEFAULTS)
    for key, f in own.items():
        assert DEFAULTS[key] == f.default
        assert type(DEFAULTS[key]) is type(f.default)
        assert Settings.model_fields[key.replace("-", "_")].description == f.metadata["doc"]


def test_prefixes_tell_methods_apart():
    """No key means two things: what a method declares is under its own prefix, which only CAFEDistill has not. Its
    variant reads its settings, and declares those that it has not."""
    owners = [key for method in METHODS for key in keys_declared_by(method)]
    assert len(owners) == len(set(owners))
    shared = {key for key in keys_of("cafedistill-plus")[0] if not key.startswith("plus-")}
    assert shared == set(keys_of("cafedistill")[0]) - {"distill-weight"}
    for method in METHODS.keys() - {"cafedistill-plus"}:
        assert keys_of(method)[0] == keys_declared_by(method)
    prefixes = [cls.prefix for cls in METHODS.values()]
    assert len(set(prefixes)) == len(METHODS)
    assert [name for name, cls in METHODS.items() if not cls.prefix] == ["cafedistill"]
    assert all(prefix == "" or prefix.endswith("-") for prefix in prefixes)
    runs_own = {kebab(name) for name in Settings.__annotations__}
    assert not set(owners) & (runs_own | {kebab(name) for name in declared_settings(Method)})


@pytest.mark.parametrize("method", METHODS)
def test_every_choice_of_a_method_can_be_set(method):
    needed = {"prior-counts": {"prior-match-by": "classifiers"}}  # class means would tell what counts hide
    for key, f in keys_of(method)[0].items():
        for choice in f.metadata["choices"]:
            built = Settings.from_run_config({"method": method, **needed.get(key, {}), key: choice}).build_method()
            assert getattr(built, f.name) == choice


@pytest.mark.parametrize("counts", ["noised", "none"])
def test_counts_that_are_hidden_although_class_means_tell_them_are_refused_before_the_run(counts):
    with pytest.raises(ValueError, match="set match_by to 'classifiers'"):
        Settings.from_run_config({"method": "cafedistill-prior", "prior-counts": counts})


def test_the_choices_of_cafedistill_are_those_of_its_parts():
    own, _ = keys_of("cafedistill-text")
    assert own["text-selection"].metadata["choices"] == tuple(SELECTIONS)
    assert own["text-teachers"].metadata["choices"] == tuple(TEACHERS)
    assert own["text-similarity-proxy"].metadata["choices"] == tuple(PROXIES)
    assert METHODS["fedper"].__dataclass_fields__["classifier_start"].metadata["choices"] == tuple(STARTS)


@pytest.mark.parametrize("method", METHODS)
def test_every_bound_of_a_method_holds_and_is_no_tighter(method):
    """The value at a bound can be set, or not where it says `greater than`; the next one cannot, and is refused by the
    name of the key."""
    for key, f in keys_of(method)[0].items():
        bounds, number = f.metadata, type(f.default)
        if number is bool or isinstance(f.default, str):
            continue
        step = 1 if number is int else 1e-6
        sides = {"ge": (0, -step), "gt": (step, 0), "le": (0, step)}  # how far from the bound is good, and bad
        good = [bounds[b] + inside for b, (inside, _) in sides.items() if bounds[b] is not None]
        bad = [bounds[b] + outside for b, (_, outside) in sides.items() if bounds[b] is not None]
        assert bad, f"{key} has no bounds"
        for value in good:
            built = Settings.from_run_config({"method": method, key: number(value)}).build_method()
            assert getattr(built, f.name) == value
        for value in bad:
            with pytest.raises(ValueError, match=f"^{key} should be (greater|less) than .*, got "):
                Settings.from_run_config({"method": method, key: number(value)})


@pytest.mark.parametrize(
    ("method", "nearest"),
    [("fedavgg", "fedavg"), ("cafe-distill", "cafedistill"), ("FedPer", "fedper"), ("dito", "ditto"), ("zzz", None)],
)
def test_an_unknown_method_is_refused_with_the_nearest_and_all_there_are(method, nearest):
    hint = rf"; did you mean '{nearest}'\?" if nearest else ""
    with pytest.raises(ValueError, match=f"^method should be one of {', '.join(METHODS)}, got '{method}'{hint}$"):
        Settings.from_run_config({"method": method})


@pytest.mark.parametrize("method", METHODS)
def test_too_few_steps_for_the_phases_of_a_method_are_refused(method):
    """A single step cannot be shared by two phases; it can if each takes all, or passes are counted; two steps can."""
    config = {"method": method, "local-steps": 1}
    if METHODS[method].phases == 1:
        Settings.from_run_config(config)
    else:
        with pytest.raises(ValueError, match=f"local-steps = 1 cannot be shared by the 2 things that {method} trains"):
            Settings.from_run_config(config)
        Settings.from_run_config({**config, "equal-steps": False})
        Settings.from_run_config({**config, "local-epochs": 1})
        Settings.from_run_config({**config, "local-steps": 2})


def test_settings_that_a_method_does_not_read_are_known():
    """What the report may leave out: the others' own, not those of every method or of the run."""
    others = keys_of_other_methods("ditto")
    assert {"mu", "solver", "fedprox-mu", "text-mu", "prior-pull", "plus-mixture-examples"} <= others
    assert not {"ditto-pull", "prior", "distill", "equal-steps", "learning-rate"} & others
    assert keys_of_other_methods("cafedistill") >= {"ditto-pull"}
    assert "mu" not in keys_of_other_methods("cafedistill")
    assert "mu" not in keys_of_other_methods("cafedistill-plus")
    assert keys_of_other_methods("cafedistill-plus") >= {"distill-weight", "text-mu", "prior-mu"}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("dirichlet-alhpa", "dirichlet-alpha"),
        ("learning_rate", "learning-rate"),
        ("num-rounds", "num-server-rounds"),
        ("Seed", "seed"),
        ("lokal-steps", "local-steps"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key, nearest):
    with pytest.raises(ValueError, match=f"^unknown setting '{key}'; did you mean '{nearest}'\\?$"):
        Settings.from_run_config({key: 1})


def test_a_key_like_no_other_is_refused_with_all_that_are_known():
    with pytest.raises(
        ValueError, match=r"unknown setting 'zzz'; known settings: name, seed, .*max-staleness"
    ) as caught:
        Settings.from_run_config({"zzz": 1})
    assert all(key in str(caught.value) for key in DEFAULTS)


def test_python_names_are_not_keys():
    """One spelling: a manifest that has both could mean two things."""
    with pytest.raises(ValueError, match="unknown setting 'local_steps'; did you mean 'local-steps'"):
        Settings.from_run_config({"local_steps": 3})


WRONG_TYPES = [
    ("seed", "1"),
    ("seed", 1.5),
    ("seed", True),
    ("resume", "yes"),
    ("resume", 1),
    ("equal-steps", 1),
    ("ditto-pull", "0.1"),
    ("fedbabu-finetune-rounds", 2.0),
    ("method", 1),
    ("num-server-rounds", 100.0),
    ("num-server-rounds", "100"),
    ("learning-rate", "0.3"),
    ("learning-rate", False),
    ("dataset", 5),
    ("name", 3),
    ("image-channels", 0.0),
    ("stem-stride", True),
    ("mu", None),
    ("selection", 1),
    ("local-steps", [1]),
]


@pytest.mark.parametrize(("key", "value"), WRONG_TYPES)
def test_a_wrong_type_is_refused_by_name(key, value):
    """Flower does not check the types of what users override."""
    with pytest.raises(
        ValueError, match=rf"^{key} should .*, got {value!r} \(".replace("[", r"\[").replace("]", r"\]")
    ):
        Settings.from_run_config({key: value})


@given(st.sampled_from(sorted(k for k, v in DEFAULTS.items() if type(v) in (int, bool, str))), st.floats())
def test_no_number_with_a_point_passes_for_anything_else(key, value):
    with pytest.raises(ValueError, match=f"^{key} should "):
        Settings.from_run_config({key: value})


OPEN = ("test-share", "risk", "confidence-level", "privacy-delta")  # neither 0 nor 1 can be


@pytest.mark.parametrize("key", [k for k, v in DEFAULTS.items() if type(v) is float and k not in OPEN])
def test_whole_numbers_pass_for_numbers(key):
    """`learning-rate=1` on the command line is an integer in TOML."""
    nothing = ("momentum", "dropout", "calibration-share", "validation-share", "upload-clip-norm", "noise-multiplier")
    value = 0 if key in (*nothing, "max-update-ratio") else 1
    assert Settings.from_run_config({key: value}).to_run_config()[key] == value


IMPOSSIBLE = [
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**32, "less than 4294967296"),
    ("name", "../elsewhere", "match pattern"),
    ("name", "a/b", "match pattern"),
    ("name", ".hidden", "match pattern"),
    ("name", "a b", "match pattern"),
    ("name", "x" * 101, "at most 100 characters"),
    ("results-dir", "", "at least 1 character"),
    ("method", "fedavgg", "one of cafedistill, .*fedavg"),
    ("num-server-rounds", 0, "greater than or equal to 1"),
    ("num-clients", 0, "greater than or equal to 1"),
    ("mode", "serve", "'train' or 'calibrate'"),
    ("risk", 0.0, "greater than 0"),
    ("risk", 1.0, "less than 1"),
    ("confidence-level", 0.0, "greater than 0"),
    ("confidence-level", 1.0, "less than 1"),
    ("wire-dtype", "float64", "'float32' or 'float16'"),
    ("max-update-norm", -1.0, "greater than or equal to 0"),
    ("max-update-ratio", -1.0, "greater than or equal to 0"),
    ("clip-norm", -1.0, "greater than or equal to 0"),
    ("upload-clip-norm", -1.0, "greater than or equal to 0"),
    ("noise-multiplier", -0.1, "greater than or equal to 0"),
    ("privacy-delta", 0.0, "greater than 0"),
    ("privacy-delta", 1.0, "less than 1"),
    ("fraction-train", 0.0, "greater than 0"),
    ("fraction-train", 1.01, "less than or equal to 1"),
    ("min-train-nodes", 0, "greater than or equal to 1"),
    ("min-available-nodes", 0, "greater than or equal to 1"),
    ("evaluate-every", 0, "greater than or equal to 1"),
    ("wait-seconds", -1.0, "greater than or equal to 0"),
    ("round-timeout", 0.0, "greater than 0"),
    ("round-retries", -1, "greater than or equal to 0"),
    ("dataset", "cifar", "match pattern"),
    ("dataset", "local:", "match pattern"),
    ("partition", "iid", "'dirichlet', 'pathological' or 'natural'"),
    ("natural-split", "iid", "'even' or 'dirichlet'"),
    ("text-part", "headline", "'whole' or 'title'"),
    ("dirichlet-alpha", 0.0, "greater than 0"),
    ("classes-per-client", 0, "greater than or equal to 1"),
    ("examples-per-client", 9, "greater than or equal to 10"),
    ("calibration-share", -0.1, "greater than or equal to 0"),
    ("calibration-share", 1.0, "less than 1"),
    ("test-share", 0.0, "greater than 0"),
    ("test-share", 1.0, "less than 1"),
    ("validation-share", -0.1, "greater than or equal to 0"),
    ("validation-share", 1.0, "less than 1"),
    ("label-groups", -1, "greater than or equal to 0"),
    ("rotations", 0, "greater than or equal to 1"),
    ("test-shift", -0.1, "greater than or equal to 0"),
    ("test-shift", 1.1, "less than or equal to 1"),
    ("image-size", -1, "greater than or equal to 0"),
    ("image-column", "", "at least 1 character"),
    ("label-column", "", "at least 1 character"),
    ("image-channels", 2, "0, 1 or 3"),
    ("augmentation", "strong", "'usual' or 'none'"),
    ("max-tokens", 0, "greater than or equal to 1"),
    ("vocabulary", 1, "greater than or equal to 2"),
    ("long-texts", "keep", "'cut' or 'refuse'"),
    ("network", "mlp", "'conv', 'resnet18', 'transformer', 'published-conv'"),
    ("network-width", -1, "greater than or equal to 0"),
    ("network-depth", -1, "greater than or equal to 0"),
    ("norm", "none", "'group', 'batch' or 'layer'"),
    ("statistics", "keep", "'average', 'personal' or 'drop'"),
    ("stem-stride", 3, "1 or 2"),
    ("attention-heads", 0, "greater than or equal to 1"),
    ("dropout", 1.0, "less than 1"),
    ("feature-width", 0, "greater than or equal to 1"),
    ("local-steps", 0, "greater than or equal to 1"),
    ("local-epochs", -1, "greater than or equal to 0"),
    ("batch-size", 0, "greater than or equal to 1"),
    ("optimizer", "adam", "'sgd' or 'adamw'"),
    ("learning-rate", 0.0, "greater than 0"),
    ("learning-rate-schedule", "linear", "'cosine' or 'exponential'"),
    ("learning-rate-decay", 0.0, "greater than 0"),
    ("learning-rate-decay", 1.01, "less than or equal to 1"),
    ("momentum", 1.0, "less than 1"),
    ("momentum", -0.1, "greater than or equal to 0"),
    ("weight-decay", -0.1, "greater than or equal to 0"),
    ("max-grad-norm", -1.0, "greater than or equal to 0"),
    ("device", "gpu", "match pattern"),
    ("precision", "float64", "'float32', 'bfloat16' or 'float16'"),
    ("clients-per-gpu", 0, "greater than or equal to 1"),
    ("objective", "kd", "'cross-entropy', 'safe-kd', 'erde' or 'neo-kd'"),
    ("ema-decay", -0.1, "greater than or equal to 0"),
    ("ema-decay", 1.1, "less than or equal to 1"),
    ("objective-temperature", 0.0, "greater than 0"),
    ("safe-kd-alpha", -0.1, "greater than or equal to 0"),
    ("safe-kd-beta", -0.1, "greater than or equal to 0"),
    ("erde-right", -0.1, "greater than or equal to 0"),
    ("erde-wrong", -0.1, "greater than or equal to 0"),
    ("neo-kd-alpha", -0.1, "greater than or equal to 0"),
    ("neo-kd-beta", -0.1, "greater than or equal to 0"),
    ("adversarial-epsilon", -0.1, "greater than or equal to 0"),
    ("adversarial-steps", 0, "greater than or equal to 1"),
    ("text-objective-teacher", "me", "'ema' or 'matched'"),
    ("mu", 0.0, "greater than 0"),
    ("mu", -0.5, "greater than 0"),
    ("distill-weight", -1.0, "greater than or equal to 0"),
    ("temperature", 0.0, "greater than 0"),
    ("selection", "random", "'shallow-first' or 'none'"),
    ("conflict", "layers", "'clients' or 'exits'"),
    ("match-by", "features", "'updates' or 'parameters'"),
    ("classifier-start", "one", "'zero', 'common', 'own' or 'built'"),
    ("plus-mixture-examples", 0.0, "greater than 0"),
    ("text-classifier-start", "one", "'zero', 'common', 'own' or 'built'"),
    ("text-mu", -0.5, "greater than or equal to 0"),
    ("text-distill-weight", -1.0, "greater than or equal to 0"),
    ("text-temperature", 0.0, "greater than 0"),
    ("text-selection", "best", "'shallow-first', 'deep-first', 'random' or 'none'"),
    ("text-peers", "some", "'all', 'alike' or 'deeper'"),
    ("text-teachers", "all", "'matched', 'uniform' or 'own'"),
    ("text-similarity-proxy", "loss", "'parameters' or 'gradients'"),
    ("text-max-staleness", -1, "greater than or equal to 0"),
    ("prior-classifier-start", "zero", "'built'"),
    ("prior-mu", 0.0, "greater than 0"),
    ("prior-pull", -0.1, "greater than or equal to 0"),
    ("prior-pull", 1.1, "less than or equal to 1"),
    ("plus-distill-weight", -1.0, "greater than or equal to 0"),
    ("prior-distill-weight", -1.0, "greater than or equal to 0"),
    ("prior-last-weight", -1.0, "greater than or equal to 0"),
    ("prior-temperature", 0.0, "greater than 0"),
    ("prior-selection", "best", "'shallow-first', 'deep-first', 'random' or 'none'"),
    ("prior-backbone-pull", -0.1, "greater than or equal to 0"),
    ("prior-backbone-pull", 1.1, "less than or equal to 1"),
    ("prior-match-by", "name", "'features' or 'classifiers'"),
    ("prior-same-above", -1.1, "greater than or equal to -1"),
    ("prior-same-above", 1.1, "less than or equal to 1"),
    ("prior-counts", "some", "'exact', 'noised' or 'none'"),
    ("prior-count-epsilon", 0.0, "greater than 0"),
    ("depthfl-ramp", 0.0, "greater than 0"),
    ("depthfl-ramp", 1.1, "less than or equal to 1"),
    ("ditto-pull", -0.1, "greater than or equal to 0"),
    ("fedamp-sharpness", -1.0, "greater than or equal to 0"),
    ("fedamp-self-weight", 1.1, "less than or equal to 1"),
    ("fedamp-proximal", -0.1, "greater than or equal to 0"),
    ("fedbabu-classifier-start", "zero", "'common', 'own' or 'built'"),
    ("fedbabu-finetune-rounds", -1, "greater than or equal to 0"),
    ("fedpac-alignment", -1.0, "greater than or equal to 0"),
    ("fedprox-mu", -0.1, "greater than or equal to 0"),
    ("local-kd-distill-weight", -1.0, "greater than or equal to 0"),
    ("local-kd-temperature", 0.0, "greater than 0"),
    ("pfedgraph-mu", -0.1, "greater than or equal to 0"),
    ("pfedgraph-same-above", -1.1, "greater than or equal to -1"),
    ("pfedgraph-same-above", 1.1, "less than or equal to 1"),
    ("pfedgraph-alignment", -0.1, "greater than or equal to 0"),
    ("scalefl-gamma", -0.1, "greater than or equal to 0"),
    ("scalefl-temperature", 0.0, "greater than 0"),
    ("scalefl-warmup", -0.1, "greater than or equal to 0"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_name_with_what_is_allowed(key, value, allowed):
    with pytest.raises(ValueError, match=f"^{key} should .*{allowed}.*, got ") as caught:
        Settings.from_run_config({key: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("key", [k for k, v in DEFAULTS.items() if type(v) is float])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(key, value):
    with pytest.raises(ValueError, match=f"^{key} should be a finite number, got "):
        Settings.from_run_config({key: value})


def test_every_setting_with_a_range_or_a_list_is_tried_above():
    """A new setting must be tried too."""
    elsewhere = {"state-dir", "data-dir", "class-names", "depth-shares", "modalities", "partition-column"}
    elsewhere |= {"solver", "text-solver"}
    free = elsewhere | {key for key, value in DEFAULTS.items() if type(value) is bool}  # checked below
    assert {key for key, _, _ in IMPOSSIBLE} | free == set(DEFAULTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"calibration-share": 0.6, "test-share": 0.4},
            r"calibration-share \+ test-share must leave something.*0.6 \+ ",
        ),
        ({"min-train-nodes": 5, "num-clients": 4}, r"min-train-nodes \(5\) must not exceed num-clients \(4\)"),
        ({"solver": "gurobee"}, "solver must be 'exact' or one of: .*osqp.*; got 'gurobee'"),
        (
            {"method": "cafedistill-text", "text-solver": "gurobee"},
            "text-solver must be 'exact' or one of: .*osqp.*; got ",
        ),
        ({"classifier-start": "built"}, "classifier_start = 'built' is not for cafedistill: .* Set it to zero, common"),
        ({"solver": ""}, "solver must be 'exact' or one of: .*osqp.*; got ''"),
        ({"method": "fedrod", "prior": True}, "prior is not for fedrod"),
        ({"results-dir": "results"}, "results-dir must be an absolute path or start with '~', got 'results'"),
        ({"dataset": "local:pacs"}, "dataset must be an absolute path .* got 'pacs'.*or set data-dir"),
        ({"partition": "natural", "partition-column": "style"}, "dataset = 'digit-pairs' has none: set dataset to"),
        ({"dataset": "local:/a", "partition": "natural"}, "needs partition-column"),
        (
            {"dataset": "local:/a", "partition": "natural", "partition-column": "style", "label-groups": 2},
            "label-groups = 2 is not for partition = 'natural': set it to 0",
        ),
        ({"partition-column": "style"}, "partition-column = 'style' .* partition = 'dirichlet': set partition to 'nat"),
        ({"natural-split": "dirichlet"}, "natural-split = 'dirichlet' is of the natural partition"),
        ({"dirichlet-cap": True, "partition": "pathological"}, "dirichlet-cap = true .* partition = 'pathological'"),
        (
            {"dataset": "cifar100", "partition": "natural", "partition-column": "coarse_label", "dirichlet-cap": True},
            "dirichlet-cap = true .* or natural-split to 'dirichlet'",
        ),
        ({"text-part": "title"}, "text-part = 'title' is for 'ag-news', and 'digit-pairs' has no titles"),
        ({"state-dir": "./state"}, "state-dir must be an absolute path or start with '~', got './state'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_run_config(settings)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ValueError, match="unknown setting") as caught:
        Settings.from_run_config({"muu": 1, "seed": -1, "learning-rate": "fast"})
    text = str(caught.value)
    assert all(part in text for part in ("'muu'", "did you mean 'mu'?", "seed should", "learning-rate should"))
    assert text.count(";") >= 2


def test_messages_are_for_people():
    """Not a word of the library that validates, and the setting's own description."""
    with pytest.raises(ValueError, match="dirichlet-alpha") as caught:
        Settings.from_run_config({"dirichlet-alpha": -1.0})
    assert str(caught.value) == (
        "dirichlet-alpha should be greater than 0, got -1.0 "
        "(Concentration of the Dirichlet partition: small = very different clients.)"
    )
    assert caught.value.__suppress_context__


def test_the_name_of_a_run_is_given_or_made():
    assert Settings(name="mine").run_name == "mine"
    assert Settings(seed=3).run_name == "digit-pairs-cafedistill-seed3"
    assert Settings(dataset="local:/a/b.parquet").run_name == "local-cafedistill-seed0"
    assert Settings(results_dir="/x", name="mine").results == Path("/x/mine")


def test_home_is_understood_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert Settings(results_dir="~/out", name="n").results == Path("/home/someone/out/n")


def test_shares_sum_to_one():
    assert Settings().shares == pytest.approx((0.48, 0.12, 0.40))
    assert sum(Settings(calibration_share=0.0, test_share=0.3).shares) == pytest.approx(1.0)


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Settings().seed = 3


def test_settings_that_the_method_does_not_read_are_named():
    settings = Settings.from_run_config({"method": "ditto", "mu": 0.7, "ditto-pull": 0.3, "fedprox-mu": 0.01})
    assert settings.unread() == ["mu"]
    taught = {"method": "ditto", "objective": "erde", "ema-decay": 0.9, "safe-kd-alpha": 2.0, "neo-kd-beta": 0.0}
    assert Settings.from_run_config(taught).unread() == ["neo-kd-beta", "safe-kd-alpha"]
    matched = {"method": "cafedistill-text", "text-objective-teacher": "matched"}
    assert Settings.from_run_config(matched).unread() == ["text-objective-teacher"]
    assert Settings.from_run_config({**matched, "objective": "safe-kd"}).unread() == []
    assert Settings.from_run_config({"text-mu": 0.7}).unread() == ["text-mu"]
    assert Settings.from_run_config({"method": "cafedistill-plus", "mu": 0.7}).unread() == []
    assert Settings.from_run_config({"mu": 0.7}).unread() == []
