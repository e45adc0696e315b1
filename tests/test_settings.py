"""Settings: the manifest's defaults are the library's, and what cannot be is refused by name, before anything runs."""

import math
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cafe_flwr.coordination import SELECTIONS
from cafe_flwr.methods import METHODS, CafeDistillMethod, settings_of
from cafe_flwr.settings import Settings
from cafe_flwr.teaching import TEACHERS
from cafe_flwr.training import LocalBudget

ROOT = Path(__file__).parents[1]
DEFAULTS = Settings().to_run_config()


def test_the_manifest_has_every_setting_with_its_default_and_type():
    """`[tool.flwr.app.config]` is what `flwr run` starts from: keys, values and TOML types, in the same order."""
    manifest = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert manifest == DEFAULTS
    assert list(manifest) == list(DEFAULTS)
    assert {key: type(value) for key, value in manifest.items()} == {k: type(v) for k, v in DEFAULTS.items()}


def test_names_are_kebab_case_and_values_are_what_flower_can_carry():
    assert Settings.keys() == list(DEFAULTS)
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
        "selection": "random",
        "local-epochs": 3,
        "results-dir": "/tmp/here",
    }
    settings = Settings.from_run_config(changed)
    assert Settings.from_run_config(settings.to_run_config()) == settings
    assert {key: settings.to_run_config()[key] for key in changed} == changed


def test_defaults_of_the_parts_are_those_of_the_settings():
    """Whoever builds a strategy in Python gets what the manifest would give."""
    method, budget = CafeDistillMethod(), LocalBudget()
    assert settings_of(method) == {name: getattr(Settings(), name) for name in settings_of(method)}
    for name in ("batch_size", "learning_rate", "momentum", "weight_decay", "max_grad_norm"):
        assert getattr(budget, name) == getattr(Settings(), name)
    assert (budget.steps, budget.epochs) == (Settings().local_steps, Settings().local_epochs)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_every_choice_of_it_can_be_set(method):
    assert Settings.from_run_config({"method": method}).method == method
    for name in settings_of(METHODS[method]()):
        assert name in Settings.model_fields
    for selection in SELECTIONS:
        assert Settings.from_run_config({"selection": selection}).selection == selection
    for teachers in TEACHERS:
        assert Settings.from_run_config({"teachers": teachers}).teachers == teachers


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
    ("num-server-rounds", 100.0),
    ("num-server-rounds", "100"),
    ("learning-rate", "0.3"),
    ("learning-rate", False),
    ("dataset", 5),
    ("name", 3),
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


@pytest.mark.parametrize("key", [k for k, v in DEFAULTS.items() if type(v) is float and k != "test-share"])
def test_whole_numbers_pass_for_numbers(key):
    """`learning-rate=1` on the command line is an integer in TOML. (A test-share of 0 or 1 cannot be.)"""
    value = 0 if key in ("momentum", "calibration-share") else 1
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
    ("method", "fedavg", "'cafedistill'"),
    ("num-server-rounds", 0, "greater than or equal to 1"),
    ("num-clients", 0, "greater than or equal to 1"),
    ("fraction-train", 0.0, "greater than 0"),
    ("fraction-train", 1.01, "less than or equal to 1"),
    ("min-train-nodes", 0, "greater than or equal to 1"),
    ("min-available-nodes", 0, "greater than or equal to 1"),
    ("wait-seconds", -1.0, "greater than or equal to 0"),
    ("round-timeout", 0.0, "greater than 0"),
    ("dataset", "cifar", "match pattern"),
    ("dataset", "local:", "match pattern"),
    ("partition", "iid", "'dirichlet' or 'pathological'"),
    ("dirichlet-alpha", 0.0, "greater than 0"),
    ("classes-per-client", 0, "greater than or equal to 1"),
    ("examples-per-client", 9, "greater than or equal to 10"),
    ("calibration-share", -0.1, "greater than or equal to 0"),
    ("calibration-share", 1.0, "less than 1"),
    ("test-share", 0.0, "greater than 0"),
    ("test-share", 1.0, "less than 1"),
    ("image-size", -1, "greater than or equal to 0"),
    ("image-column", "", "at least 1 character"),
    ("label-column", "", "at least 1 character"),
    ("network", "mlp", "'conv'"),
    ("feature-width", 0, "greater than or equal to 1"),
    ("local-steps", 0, "greater than or equal to 1"),
    ("local-epochs", -1, "greater than or equal to 0"),
    ("batch-size", 0, "greater than or equal to 1"),
    ("learning-rate", 0.0, "greater than 0"),
    ("momentum", 1.0, "less than 1"),
    ("momentum", -0.1, "greater than or equal to 0"),
    ("weight-decay", -0.1, "greater than or equal to 0"),
    ("max-grad-norm", -1.0, "greater than or equal to 0"),
    ("mu", -0.5, "greater than or equal to 0"),
    ("distill-weight", -1.0, "greater than or equal to 0"),
    ("temperature", 0.0, "greater than 0"),
    ("selection", "best", "'shallow-first', 'deep-first', 'random' or 'none'"),
    ("teachers", "all", "'matched', 'uniform' or 'own'"),
    ("similarity-proxy", "loss", "'parameters' or 'gradients'"),
    ("solver", "", "at least 1 character"),
    ("max-staleness", -1, "greater than or equal to 0"),
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
    free = {"resume", "state-dir"}  # any bool; any text, or checked below
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
        ({"results-dir": "results"}, "results-dir must be an absolute path or start with '~', got 'results'"),
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
