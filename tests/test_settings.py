"""Settings: the manifest's defaults are the library's, and what cannot be is refused by name, before anything runs."""

import math
import pickle
import shutil
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cafe_flwr import CafeDistill
from cafe_flwr.app import launch
from cafe_flwr.app.manifest import MANIFESTS, PAGE, main, up_to_date
from cafe_flwr.cli import app
from cafe_flwr.cli.common import console
from cafe_flwr.coordination import SELECTIONS
from cafe_flwr.core.options import options_of
from cafe_flwr.data.options import Data, Heterogeneity
from cafe_flwr.methods import METHODS, CafeDistillMethod
from cafe_flwr.methods.exit_agreement import PROXIES
from cafe_flwr.methods.starts import STARTS
from cafe_flwr.networks.options import Compute, Model
from cafe_flwr.risk.options import Calibration
from cafe_flwr.server.options import Federation
from cafe_flwr.settings import FORMER, OPTIONS, TABLES, Settings, _tell_former, todays
from cafe_flwr.teaching import TEACHERS
from cafe_flwr.training.options import Schedule
from cafe_flwr.wire.options import Bounds, Privacy

ROOT = Path(__file__).parents[1]
DEFAULTS = Settings().to_run_config()


def test_the_manifest_has_every_setting_with_its_default_and_type():
    """`[tool.flwr.app.config]` is what `flwr run` starts from: keys, values, TOML types, all in order."""
    manifest = todays(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"])
    assert manifest == DEFAULTS
    assert list(manifest) == list(OPTIONS)
    assert {key: type(value) for key, value in manifest.items()} == {k: type(v) for k, v in DEFAULTS.items()}


def test_manifests_and_docs_are_as_the_declarations_say(tmp_path):
    for path, text in up_to_date(ROOT).items():
        assert path.read_text() == text
    for name in (*MANIFESTS, PAGE):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    main(["--check", "--root", str(tmp_path)])
    manifest = tmp_path / MANIFESTS[0]
    manifest.write_text(manifest.read_text().replace("num-clients = 20", "num-clients = 21"))
    with pytest.raises(SystemExit, match=r"pyproject.toml: settings differ; run python -m"):
        main(["--check", "--root", str(tmp_path)])
    main(["--write", "--root", str(tmp_path)])
    assert manifest.read_text() == (ROOT / MANIFESTS[0]).read_text()


def test_names_are_kebab_case_and_values_are_what_flower_can_carry():
    assert list(OPTIONS) == list(DEFAULTS)
    for key, value in DEFAULTS.items():
        assert key == key.lower().replace("_", "-")
        assert key.count(".") <= 1
        assert type(value) in (bool, int, float, str)


def test_no_table_bears_the_name_of_a_setting():
    """Flower has no key that is a value and a table; and a name of before is no key of today."""
    assert not set(TABLES) & (set(DEFAULTS) | set(FORMER))
    assert not set(FORMER) & set(DEFAULTS)
    assert len({name for names in FORMER.values() for name in names}) == len(
        [o for o in OPTIONS.values() if o.formerly]
    )


def test_every_setting_says_what_it_is_for():
    for o in OPTIONS.values():
        assert len(o.doc) >= 7
        assert o.doc.endswith(".")


def test_settings_survive_a_round_trip():
    changed = {
        "seed": 7,
        "mu": 0.25,
        "dataset": "local:/data/my set.parquet",
        "resume": True,
        "cafedistill.selection": "none",
        "local-epochs": 3,
        "results-dir": "/tmp/here",
    }
    settings = Settings.from_run_config(changed)
    assert Settings.from_run_config(settings.to_run_config()) == settings
    assert {key: settings.to_run_config()[key] for key in changed} == changed


def test_defaults_of_the_parts_are_those_of_the_settings():
    """Whoever builds a strategy in Python gets what the manifest would give."""
    assert Settings().build_method() == CafeDistillMethod()
    assert Settings().build_budget() == CafeDistill().local
    for part in (Federation, Data, Heterogeneity, Model, Schedule, Compute, Bounds, Privacy, Calibration):
        assert Settings().of(part) == part()


def keys_of(method):
    """Fields of a method by key: its own, and the method's that it is a variant of; not those of all methods."""
    declared = METHODS[method].__dataclass_fields__
    return {o.key: declared[o.field] for o in options_of(METHODS[method]) if o.table != "train"}


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_every_method_is_a_key_of_its_table(method):
    """With the default, description and type of the method; unset, the method is as it is made in Python."""
    assert Settings.from_run_config({"method": method}).build_method() == METHODS[method]()
    for key, f in keys_of(method).items():
        assert DEFAULTS[key] == f.default
        assert type(DEFAULTS[key]) is type(f.default)
        assert OPTIONS[key].doc == f.metadata["doc"]


def test_tables_tell_methods_apart():
    """What a method declares is in the table of its name; three of CAFEDistill are in none."""
    for method in METHODS:
        own = {key.rpartition(".")[0] for key in keys_of(method)}
        assert own <= ({method} if not method.startswith("cafedistill") else {"", "cafedistill", method})
    assert {key for key in keys_of("cafedistill") if "." not in key} == {"mu", "distill-weight", "temperature"}
    shared = {key for key in keys_of("cafedistill-plus") if not key.startswith("cafedistill-plus.")}
    assert shared == set(keys_of("cafedistill")) - {"distill-weight"}


@pytest.mark.parametrize("method", METHODS)
def test_every_choice_of_a_method_can_be_set(method):
    needed = {
        "cafedistill-prior.counts": {"cafedistill-prior.match-by": "classifiers"}
    }  # class means would tell what counts hide
    for key, f in keys_of(method).items():
        for choice in f.metadata["choices"]:
            built = Settings.from_run_config({"method": method, **needed.get(key, {}), key: choice}).build_method()
            assert getattr(built, f.name) == choice


@pytest.mark.parametrize("counts", ["noised", "none"])
def test_counts_that_are_hidden_although_class_means_tell_them_are_refused_before_the_run(counts):
    with pytest.raises(ValueError, match=r"set cafedistill-prior\.match-by to 'classifiers'"):
        Settings.from_run_config({"method": "cafedistill-prior", "cafedistill-prior.counts": counts})


def test_the_choices_of_cafedistill_are_those_of_its_parts():
    own = keys_of("cafedistill-text")
    assert own["cafedistill-text.selection"].metadata["choices"] == tuple(SELECTIONS)
    assert own["cafedistill-text.teachers"].metadata["choices"] == tuple(TEACHERS)
    assert own["cafedistill-text.similarity-proxy"].metadata["choices"] == tuple(PROXIES)
    assert METHODS["fedper"].__dataclass_fields__["classifier_start"].metadata["choices"] == tuple(STARTS)


@pytest.mark.parametrize("method", METHODS)
def test_every_bound_of_a_method_holds_and_is_no_tighter(method):
    """The value at a bound can be set, or not where it says `greater than`; the next one cannot, and is refused by the
    name of the key."""
    for key, f in keys_of(method).items():
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
        Settings.from_run_config({**config, "train.equal-steps": False})
        Settings.from_run_config({**config, "local-epochs": 1})
        Settings.from_run_config({**config, "local-steps": 2})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("dirichlet-alhpa", "dirichlet-alpha"),
        ("learning_rate", "learning-rate"),
        ("num-rounds", "num-server-rounds"),
        ("Seed", "seed"),
        ("federation.fraction-trian", "federation.fraction-train"),
        ("fraction-trian", "federation.fraction-train"),
        ("model.network-width", "model.width"),
        ("fedprox-mu.mu", "fedprox.mu"),
        ("data.dirichlet-alpha", "dirichlet-alpha"),
        ("lokal-steps", "local-steps"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key, nearest):
    with pytest.raises(ValueError, match=f"^unknown setting '{key}'; did you mean '{nearest}'\\?$"):
        Settings.from_run_config({key: 1})


def test_a_key_like_no_other_is_refused_with_the_command_that_lists_all():
    with pytest.raises(ValueError, match=r"unknown setting 'zzz'; cafe-flwr settings lists all"):
        Settings.from_run_config({"zzz": 1})


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
    ("train.equal-steps", 1),
    ("ditto.pull", "0.1"),
    ("fedbabu.finetune-rounds", 2.0),
    ("method", 1),
    ("num-server-rounds", 100.0),
    ("num-server-rounds", "100"),
    ("learning-rate", "0.3"),
    ("learning-rate", False),
    ("dataset", 5),
    ("name", 3),
    ("data.image-channels", 0.0),
    ("model.stem-stride", True),
    ("mu", None),
    ("cafedistill.selection", 1),
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


OPEN = (
    "data.test-share",
    "calibration.risk",
    "calibration.confidence-level",
    "privacy.delta",
)  # neither 0 nor 1 can be


@pytest.mark.parametrize("key", [k for k, v in DEFAULTS.items() if type(v) is float and k not in OPEN])
def test_whole_numbers_pass_for_numbers(key):
    """`learning-rate=1` on the command line is an integer in TOML."""
    nothing = (
        "train.momentum",
        "model.dropout",
        "data.calibration-share",
        "data.validation-share",
        "privacy.upload-clip-norm",
        "privacy.noise-multiplier",
    )
    ratios = [f"federation.{name}" for name in ("max-update-ratio", "long-update-ratio", "max-examples-ratio")]
    value = 0 if key in (*nothing, *ratios, "federation.trim-share") else 1
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
    ("calibration.risk", 0.0, "greater than 0"),
    ("calibration.risk", 1.0, "less than 1"),
    ("calibration.confidence-level", 0.0, "greater than 0"),
    ("calibration.confidence-level", 1.0, "less than 1"),
    ("federation.wire-dtype", "float64", "'float32' or 'float16'"),
    ("federation.max-update-norm", -1.0, "greater than or equal to 0"),
    ("federation.max-update-ratio", -1.0, "greater than or equal to 0"),
    ("federation.long-update-ratio", -1.0, "greater than or equal to 0"),
    ("federation.max-examples-ratio", -1.0, "greater than or equal to 0"),
    ("federation.aggregation", "krum", "'mean', 'median', 'trimmed-mean' or 'clipped-mean'"),
    ("federation.trim-share", 0.5, "less than 0.5"),
    ("privacy.clip-norm", -1.0, "greater than or equal to 0"),
    ("privacy.upload-clip-norm", -1.0, "greater than or equal to 0"),
    ("privacy.noise-multiplier", -0.1, "greater than or equal to 0"),
    ("privacy.delta", 0.0, "greater than 0"),
    ("privacy.delta", 1.0, "less than 1"),
    ("federation.fraction-train", 0.0, "greater than 0"),
    ("federation.fraction-train", 1.01, "less than or equal to 1"),
    ("federation.min-train-nodes", 0, "greater than or equal to 1"),
    ("federation.min-available-nodes", 0, "greater than or equal to 1"),
    ("federation.evaluate-every", 0, "greater than or equal to 1"),
    ("federation.wait-seconds", -1.0, "greater than or equal to 0"),
    ("federation.round-timeout", 0.0, "greater than 0"),
    ("federation.round-retries", -1, "greater than or equal to 0"),
    ("dataset", "cifar", "match pattern"),
    ("dataset", "local:", "match pattern"),
    ("data.partition", "iid", "'dirichlet', 'pathological' or 'natural'"),
    ("data.natural-split", "iid", "'even' or 'dirichlet'"),
    ("data.text-part", "headline", "'whole' or 'title'"),
    ("dirichlet-alpha", 0.0, "greater than 0"),
    ("data.classes-per-client", 0, "greater than or equal to 1"),
    ("data.examples-per-client", 9, "greater than or equal to 10"),
    ("data.calibration-share", -0.1, "greater than or equal to 0"),
    ("data.calibration-share", 1.0, "less than 1"),
    ("data.test-share", 0.0, "greater than 0"),
    ("data.test-share", 1.0, "less than 1"),
    ("data.validation-share", -0.1, "greater than or equal to 0"),
    ("data.validation-share", 1.0, "less than 1"),
    ("data.label-groups", -1, "greater than or equal to 0"),
    ("data.rotations", 0, "greater than or equal to 1"),
    ("data.test-shift", -0.1, "greater than or equal to 0"),
    ("data.test-shift", 1.1, "less than or equal to 1"),
    ("data.image-size", -1, "greater than or equal to 0"),
    ("data.image-column", "", "at least 1 character"),
    ("data.label-column", "", "at least 1 character"),
    ("data.image-channels", 2, "0, 1 or 3"),
    ("data.augmentation", "strong", "'usual' or 'none'"),
    ("data.max-tokens", 0, "greater than or equal to 1"),
    ("data.vocabulary", 1, "greater than or equal to 2"),
    ("data.long-texts", "keep", "'cut' or 'refuse'"),
    ("network", "mlp", "'conv', 'resnet18', 'transformer', 'published-conv'"),
    ("model.width", -1, "greater than or equal to 0"),
    ("model.depth", -1, "greater than or equal to 0"),
    ("model.norm", "none", "'group', 'batch' or 'layer'"),
    ("model.statistics", "keep", "'average', 'personal' or 'drop'"),
    ("model.stem-stride", 3, "1 or 2"),
    ("model.attention-heads", 0, "greater than or equal to 1"),
    ("model.dropout", 1.0, "less than 1"),
    ("model.feature-width", 0, "greater than or equal to 1"),
    ("local-steps", 0, "greater than or equal to 1"),
    ("local-epochs", -1, "greater than or equal to 0"),
    ("train.batch-size", 0, "greater than or equal to 1"),
    ("train.optimizer", "adam", "'sgd' or 'adamw'"),
    ("learning-rate", 0.0, "greater than 0"),
    ("train.learning-rate-schedule", "linear", "'cosine' or 'exponential'"),
    ("train.learning-rate-decay", 0.0, "greater than 0"),
    ("train.learning-rate-decay", 1.01, "less than or equal to 1"),
    ("train.momentum", 1.0, "less than 1"),
    ("train.momentum", -0.1, "greater than or equal to 0"),
    ("train.weight-decay", -0.1, "greater than or equal to 0"),
    ("train.max-grad-norm", -1.0, "greater than or equal to 0"),
    ("compute.device", "gpu", "match pattern"),
    ("compute.precision", "float64", "'float32', 'bfloat16' or 'float16'"),
    ("compute.clients-per-gpu", 0, "greater than or equal to 1"),
    ("objective", "kd", "'cross-entropy', 'safe-kd', 'erde' or 'neo-kd'"),
    ("safe-kd.ema-decay", -0.1, "greater than or equal to 0"),
    ("safe-kd.ema-decay", 1.1, "less than or equal to 1"),
    ("erde.ema-decay", 1.1, "less than or equal to 1"),
    ("erde.temperature", 0.0, "greater than 0"),
    ("safe-kd.temperature", 0.0, "greater than 0"),
    ("safe-kd.alpha", -0.1, "greater than or equal to 0"),
    ("safe-kd.beta", -0.1, "greater than or equal to 0"),
    ("erde.right", -0.1, "greater than or equal to 0"),
    ("erde.wrong", -0.1, "greater than or equal to 0"),
    ("neo-kd.alpha", -0.1, "greater than or equal to 0"),
    ("neo-kd.beta", -0.1, "greater than or equal to 0"),
    ("neo-kd.epsilon", -0.1, "greater than or equal to 0"),
    ("neo-kd.steps", 0, "greater than or equal to 1"),
    ("cafedistill-text.objective-teacher", "me", "'ema' or 'matched'"),
    ("mu", 0.0, "greater than 0"),
    ("mu", -0.5, "greater than 0"),
    ("distill-weight", -1.0, "greater than or equal to 0"),
    ("temperature", 0.0, "greater than 0"),
    ("cafedistill.selection", "random", "'shallow-first' or 'none'"),
    ("cafedistill.conflict", "layers", "'clients' or 'exits'"),
    ("cafedistill.match-by", "features", "'updates' or 'parameters'"),
    ("train.classifier-start", "one", "'zero', 'common', 'own' or 'built'"),
    ("cafedistill-plus.mixture-examples", 0.0, "greater than 0"),
    ("cafedistill-text.classifier-start", "one", "'zero', 'common', 'own' or 'built'"),
    ("cafedistill-text.mu", -0.5, "greater than or equal to 0"),
    ("cafedistill-text.distill-weight", -1.0, "greater than or equal to 0"),
    ("cafedistill-text.temperature", 0.0, "greater than 0"),
    ("cafedistill-text.selection", "best", "'shallow-first', 'deep-first', 'random' or 'none'"),
    ("cafedistill-text.peers", "some", "'all', 'alike' or 'deeper'"),
    ("cafedistill-text.teachers", "all", "'matched', 'uniform' or 'own'"),
    ("cafedistill-text.similarity-proxy", "loss", "'parameters' or 'gradients'"),
    ("cafedistill-text.max-staleness", -1, "greater than or equal to 0"),
    ("cafedistill-prior.classifier-start", "zero", "'built'"),
    ("cafedistill-prior.mu", 0.0, "greater than 0"),
    ("cafedistill-prior.pull", -0.1, "greater than or equal to 0"),
    ("cafedistill-prior.pull", 1.1, "less than or equal to 1"),
    ("cafedistill-plus.distill-weight", -1.0, "greater than or equal to 0"),
    ("cafedistill-prior.distill-weight", -1.0, "greater than or equal to 0"),
    ("data.image-range", "0..x", "match pattern"),
    ("cafedistill-prior.last-weight", -1.0, "greater than or equal to 0"),
    ("cafedistill-prior.temperature", 0.0, "greater than 0"),
    ("cafedistill-prior.selection", "best", "'shallow-first', 'deep-first', 'random' or 'none'"),
    ("cafedistill-prior.backbone-pull", -0.1, "greater than or equal to 0"),
    ("cafedistill-prior.backbone-pull", 1.1, "less than or equal to 1"),
    ("cafedistill-prior.match-by", "name", "'features' or 'classifiers'"),
    ("cafedistill-prior.same-above", -1.1, "greater than or equal to -1"),
    ("cafedistill-prior.same-above", 1.1, "less than or equal to 1"),
    ("cafedistill-prior.counts", "some", "'exact', 'noised' or 'none'"),
    ("cafedistill-prior.count-epsilon", 0.0, "greater than 0"),
    ("depthfl.ramp", 0.0, "greater than 0"),
    ("depthfl.ramp", 1.1, "less than or equal to 1"),
    ("ditto.pull", -0.1, "greater than or equal to 0"),
    ("fedamp.sharpness", -1.0, "greater than or equal to 0"),
    ("fedamp.self-weight", 1.1, "less than or equal to 1"),
    ("fedamp.proximal", -0.1, "greater than or equal to 0"),
    ("fedbabu.classifier-start", "zero", "'common', 'own' or 'built'"),
    ("fedbabu.finetune-rounds", -1, "greater than or equal to 0"),
    ("fedpac.alignment", -1.0, "greater than or equal to 0"),
    ("fedprox.mu", -0.1, "greater than or equal to 0"),
    ("local-kd.distill-weight", -1.0, "greater than or equal to 0"),
    ("local-kd.temperature", 0.0, "greater than 0"),
    ("pfedgraph.mu", -0.1, "greater than or equal to 0"),
    ("pfedgraph.same-above", -1.1, "greater than or equal to -1"),
    ("pfedgraph.same-above", 1.1, "less than or equal to 1"),
    ("pfedgraph.alignment", -0.1, "greater than or equal to 0"),
    ("scalefl.gamma", -0.1, "greater than or equal to 0"),
    ("scalefl.temperature", 0.0, "greater than 0"),
    ("scalefl.warmup", -0.1, "greater than or equal to 0"),
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


NATURAL = {"dataset": "cifar100", "data.partition": "natural", "data.partition-column": "coarse_label"}


@pytest.mark.parametrize("key", [k for k, v in DEFAULTS.items() if type(v) in (int, float)])
@pytest.mark.parametrize("value", [10**30, 10**5000, 1e308], ids=["e30", "e5000", "e308"])
def test_numbers_that_nobody_means_are_refused(key, value):
    if isinstance(value, float) and type(DEFAULTS[key]) is int:
        return
    with pytest.raises(ValueError, match=f"^{key} should "):
        Settings.from_run_config({key: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heterogeneity.depth-shares": "99:0.5"}, "heterogeneity.depth-shares asks for 99 exits, .* network has 3"),
        ({"heterogeneity.depth-shares": "4:0.5", "model.depth": 3}, "asks for 4 exits, and this network has 3"),
        ({"model.width": 8192}, "model.width = 8192 and model.depth = 0 make a last block of 32768 channels"),
        ({"model.depth": 64}, "make a last block of .* channels, as every block has twice the channels"),
        ({"federation.max-update-ratio": 1.0}, "^federation.max-update-ratio must be greater than 1"),
        ({"privacy.noise-multiplier": 1.0}, "^privacy.noise-multiplier and privacy.upload-clip-norm need a privacy.cl"),
        ({"results-dir": "~nosuchuser/x"}, "results-dir is no path that can be used, .*: there is no such user"),
        ({"results-dir": "/\x00x"}, "results-dir is no path that can be used, .* cannot be printed"),
        ({"data.dir": "/" + "a" * 256, **NATURAL}, "data.dir is no path that can be used, .* longer than 255 bytes"),
    ],
)
def test_what_cannot_be_is_refused_under_the_name_that_was_set(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_run_config(settings)


DEEP: dict[str, Any] = {}
for _ in range(50):
    DEEP = {"a": DEEP}
ODD = [
    *(0, -1, 10**30, 10**5000, 0.5, 1e308, math.nan, True, None, "", "x", "x" * 10**5, "\x00", "~nosuchuser/x"),
    *(
        "\ud800",
        "\u202e",
        "\x1b[2J",
        "/" + "a" * 300,
        "1x0:.5",
        "local:",
        "a,a,",
        b"x",
        [],
        ["a"] * 10**4,
        {},
        DEEP,
        1j,
    ),
]


@given(
    st.dictionaries(
        st.one_of(
            st.sampled_from([*DEFAULTS, *FORMER, *TABLES, "x" * 10**5, "", ".", "train.", "\ud800", "Seed", "a.b.c"]),
            st.sampled_from([5, None, 1.5, b"seed", True]),
            st.text(max_size=8),
        ),
        st.sampled_from(ODD),
        max_size=4,
    )
)
def test_whatever_is_set_is_read_or_refused_in_a_sentence(config):
    said = None
    try:
        Settings.from_run_config(config).check_read()
    except ValueError as error:
        said = error
    assert said is None or type(said) is ValueError
    assert said is None or (20 < len(str(said)) <= 2000 and str(said).isprintable())


def test_every_setting_with_a_range_or_a_list_is_tried_above():
    """A new setting must be tried too."""
    elsewhere = {
        "federation.state-dir",
        "data.dir",
        "data.class-names",
        "heterogeneity.depth-shares",
        "heterogeneity.modalities",
        "data.partition-column",
    }
    elsewhere |= {"cafedistill.solver", "cafedistill-text.solver"}
    free = elsewhere | {key for key, value in DEFAULTS.items() if type(value) is bool}  # checked below
    assert {key for key, _, _ in IMPOSSIBLE} | free == set(DEFAULTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"data.calibration-share": 0.6, "data.test-share": 0.4},
            r"data.calibration-share \+ data.test-share must leave something.*0.6 \+ ",
        ),
        (
            {"federation.min-train-nodes": 5, "num-clients": 4},
            r"federation.min-train-nodes \(5\) must not exceed num-clients \(4\)",
        ),
        ({"cafedistill.solver": "gurobee"}, "solver must be 'exact' or one of: .*osqp.*; got 'gurobee'"),
        (
            {"method": "cafedistill-text", "cafedistill-text.solver": "gurobee"},
            "cafedistill-text.solver must be 'exact' or one of: .*osqp.*; got ",
        ),
        (
            {"train.classifier-start": "built"},
            "train.classifier-start = 'built' is not for cafedistill: .* Set it to zero, common",
        ),
        ({"cafedistill.solver": ""}, "solver must be 'exact' or one of: .*osqp.*; got ''"),
        ({"method": "fedrod", "train.prior": True}, "prior is not for fedrod"),
        ({"results-dir": "results"}, "results-dir must be an absolute path or start with '~', got 'results'"),
        ({"dataset": "local:pacs"}, "dataset must be an absolute path .* got 'pacs'.*or set data.dir"),
        (
            {"data.partition": "natural", "data.partition-column": "style"},
            "dataset = 'digit-pairs' has none: set dataset to",
        ),
        ({"dataset": "local:/a", "data.partition": "natural"}, "needs data.partition-column"),
        (
            {
                "dataset": "local:/a",
                "data.partition": "natural",
                "data.partition-column": "style",
                "data.label-groups": 2,
            },
            "data.label-groups = 2 is not for data.partition = 'natural': set it to 0",
        ),
        (
            {"data.partition-column": "style"},
            "data.partition-column = 'style' .* data.partition = 'dirichlet': set data.partition to 'nat",
        ),
        ({"data.natural-split": "dirichlet"}, "data.natural-split = 'dirichlet' is of the natural partition"),
        (
            {"data.dirichlet-cap": True, "data.partition": "pathological"},
            "data.dirichlet-cap = true .* data.partition = 'pathological'",
        ),
        (
            {
                "dataset": "cifar100",
                "data.partition": "natural",
                "data.partition-column": "coarse_label",
                "data.dirichlet-cap": True,
            },
            "data.dirichlet-cap = true .* or data.natural-split to 'dirichlet'",
        ),
        ({"data.text-part": "title"}, "data.text-part = 'title' is for 'ag-news', and 'digit-pairs' has no titles"),
        (
            {"federation.state-dir": "./state"},
            "federation.state-dir must be an absolute path or start with '~', got './state'",
        ),
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
    assert Data().shares == pytest.approx((0.48, 0.12, 0.40))
    assert sum(Data(calibration_share=0.0, test_share=0.3).shares) == pytest.approx(1.0)


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Settings().seed = 3


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"method": "ditto", "mu": 0.7, "ditto.pull": 0.3, "fedprox.mu": 0.01}, ["mu"]),
        (
            {"method": "ditto", "objective": "erde", "erde.ema-decay": 0.9, "safe-kd.alpha": 2.0, "neo-kd.beta": 0.0},
            ["neo-kd.beta", "safe-kd.alpha"],
        ),
        (
            {"method": "cafedistill-text", "cafedistill-text.objective-teacher": "matched"},
            ["cafedistill-text.objective-teacher"],
        ),
        (
            {"method": "cafedistill-text", "cafedistill-text.objective-teacher": "matched", "objective": "safe-kd"},
            [],
        ),
        ({"cafedistill-text.mu": 0.7}, ["cafedistill-text.mu"]),
        ({"method": "cafedistill-plus", "mu": 0.7}, []),
        ({"method": "cafedistill-plus", "distill-weight": 0.7}, ["distill-weight"]),
        ({"method": "fedbabu", "train.classifier-start": "own"}, ["train.classifier-start"]),
        ({"mu": 0.7}, []),
        ({"calibration.risk": 0.1}, ["calibration.risk"]),
        ({"calibration.risk": 0.1, "mode": "calibrate"}, []),
        ({"data.max-tokens": 9}, ["data.max-tokens"]),
        ({"data.max-tokens": 9, "dataset": "ag-news", "network": "transformer"}, []),
        ({"data.image-size": 9, "dataset": "local:/a"}, []),
        ({"model.dropout": 0.5}, ["model.dropout"]),
        ({"data.classes-per-client": 3}, ["data.classes-per-client"]),
        ({"data.classes-per-client": 3, "data.partition": "pathological"}, []),
        ({"dirichlet-alpha": 0.3, "data.partition": "pathological"}, ["dirichlet-alpha"]),
        ({"dirichlet-alpha": 0.3, **NATURAL}, ["dirichlet-alpha"]),
        ({"dirichlet-alpha": 0.3, **NATURAL, "data.natural-split": "dirichlet"}, []),
        ({"data.dir": "/a"}, ["data.dir"]),
        ({"data.dir": "/a", "dataset": "local:b"}, []),
        ({"privacy.delta": 1e-6}, ["privacy.delta"]),
        ({"privacy.delta": 1e-6, "privacy.clip-norm": 1.0}, ["privacy.delta"]),
        ({"privacy.delta": 1e-6, "privacy.clip-norm": 1.0, "privacy.noise-multiplier": 0.1}, []),
    ],
)
def test_what_is_set_and_not_read_is_refused_with_what_would_read_it(settings, unread):
    read = Settings.from_run_config(settings)
    assert sorted(read.unread()) == unread
    if not unread:
        read.check_read()
        return
    with pytest.raises(ValueError, match="would change nothing: it is read with ") as caught:
        read.check_read()
    assert all(f"{key} = " in str(caught.value) for key in unread)


def test_the_sentence_on_what_is_not_read():
    with pytest.raises(ValueError, match="ditto") as caught:
        Settings.from_run_config({"ditto.pull": 0.7}).check_read()
    assert str(caught.value) == (
        "ditto.pull = 0.7 would change nothing: it is read with method = 'ditto', and method = 'cafedistill'"
    )


# --- tables, and names from before there were any --------------------------------------------------------------------


def test_tables_and_dots_are_the_same():
    nested = {"seed": 3, "federation": {"fraction-train": 0.5}, "safe-kd": {"alpha": 2.0}, "objective": "safe-kd"}
    read = Settings.from_run_config(nested)
    flat = {"seed": 3, "federation.fraction-train": 0.5, "safe-kd.alpha": 2.0, "objective": "safe-kd"}
    assert read == Settings.from_run_config(flat)
    assert (read.federation.fraction_train, read.safe_kd.alpha) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"federation": 3}, "^federation is a table of settings, got 3: write federation.fraction-train = 1.0$"),
        ({"seed": {"a": 1}}, r"^seed is one value, got the table {'a': 1}: write seed = 0, or the like$"),
        (
            {"train": {"momentum": {"a": 1}}},
            r"^train.momentum is one value, got the table {'a': 1}: write train.momentum",
        ),
        ({"federation": 1, "federation.fraction-train": 0.5}, "federation is a table of settings, got 1: write"),
        ({"seed": 1, "seed.a": 2}, "'seed' is there as a value and as a table: leave one out"),
        ({"seed.a": 2, "seed": 1}, "'seed' is there as a value and as a table: leave one out"),
        (
            {"federation": {"fraction-train": 0.5}, "federation.fraction-train": 0.5},
            "'federation.fraction-train' is there twice, in a table and with a dot: leave one out",
        ),
        (
            {"fraction-train": 0.5, "federation.fraction-train": 0.5},
            "'fraction-train' and 'federation.fraction-train' are the same setting: leave out 'fraction-train', its na",
        ),
        (
            {"federation": {"fraction-train": 0.5}, "fraction-train": 1.0},
            "are the same setting: leave out 'fraction-tr",
        ),
    ],
)
def test_a_table_in_the_place_of_a_value_or_a_setting_twice_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_run_config(config)


@pytest.mark.parametrize("name", sorted(FORMER))
def test_a_name_from_before_there_were_tables_is_read(name, flower_log):
    """With a line that says the key; values, bounds and all else are those of the key."""
    _tell_former.cache_clear()
    values = {"objective": FORMER[name][0].partition(".")[0]} if len(FORMER[name]) > 1 else {}
    key = FORMER[name][0]
    assert Settings.from_run_config({**values, name: DEFAULTS[key]}) == Settings.from_run_config(values)
    assert f"'{name}' is '{key}'" in flower_log.text()


def test_a_name_that_two_objectives_read_is_of_the_one_that_is_chosen():
    for objective, other in (("safe-kd", "erde"), ("erde", "safe-kd")):
        read = todays({"objective": objective, "ema-decay": 0.5, "objective-temperature": 2.0})
        assert read == {"objective": objective, f"{objective}.ema-decay": 0.5, f"{objective}.temperature": 2.0}
        assert not any(key.startswith(other) for key in read)
    assert todays({"ema-decay": 0.5}) == {"safe-kd.ema-decay": 0.5, "erde.ema-decay": 0.5}


def test_of_many_old_names_some_are_told(flower_log):
    _tell_former.cache_clear()
    Settings.from_run_config({name: DEFAULTS[keys[0]] for name, keys in FORMER.items() if len(keys) == 1})
    assert f"and {len(FORMER) - 2 - 8} more" in flower_log.text()
    assert flower_log.text().count("last to read the old ones") == 1


# --- on the command line ---------------------------------------------------------------------------------------------


def test_the_command_lists_all_settings_or_a_table(monkeypatch):
    command = CliRunner()
    monkeypatch.setattr(console, "_width", 200)
    listed = command.invoke(app, ["settings"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0
    assert all(key in listed.output for key in OPTIONS)
    table = command.invoke(app, ["settings", "ditto"], env={"COLUMNS": "200"})
    assert "ditto.pull" in table.output
    assert "train.batch-size" not in table.output
    wrong = command.invoke(app, ["settings", "trian"])
    assert wrong.exit_code == 1
    assert "there is no table 'trian'; did you mean 'train'?" in wrong.output


def test_flower_gets_one_flag_with_all_pairs(monkeypatch, tmp_path):
    """Of two flags with keys of one table it would lose the first."""
    calls = []
    monkeypatch.setattr(launch, "flwr", lambda env, *given: calls.append(given) or {"success": False})
    pairs = ["seed=1", "federation.fraction-train=0.5", "federation.wait-seconds=1.0"]
    with pytest.raises(RuntimeError, match="Flower refused the run"):
        launch.run_app(tmp_path, {}, pairs, ["num-supernodes=2", "client-resources-num-cpus=1"])
    flags = [option for option in calls[0] if option.startswith(("--run-config", "--federation"))]
    assert flags == [
        f"--run-config={' '.join(pairs)}",
        "--federation-config=num-supernodes=2 client-resources-num-cpus=1",
    ]
    given = parse_config_args([flags[0].partition("=")[2]])
    assert given == {"seed": 1, "federation.fraction-train": 0.5, "federation.wait-seconds": 1.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("ditto.pull=0.5", "ditto.pull = 0.5 would change nothing: it is read with method = 'ditto'"),
        ("fraction-train=0.5 federation.fraction-train=0.4", "are the same setting"),
        ("federation=1", "federation is a table of settings, got 1"),
        ("fraktion-train=0.5", "did you mean 'federation.fraction-train'?"),
    ],
)
def test_the_command_refuses_before_flower_starts(given, said):
    done = CliRunner().invoke(app, ["run", str(ROOT), "--run-config", given], env={"COLUMNS": "400"})
    assert done.exit_code == 1
    assert said in done.output


def test_the_command_tells_what_is_wrong_with_data_before_flower_starts(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"no image")
    config = f'dataset="local:{tmp_path}" num-clients=2'
    done = CliRunner().invoke(app, ["run", str(ROOT), "--run-config", config], env={"COLUMNS": "400"})
    assert done.exit_code == 1
    assert "cat/0.png" in done.output
    assert "Traceback" not in done.output


def test_the_command_takes_names_of_before_and_gives_flower_those_of_today(monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "run_app", lambda app, env, pairs, *_: seen.extend(pairs) or launch.RunStatus(1, "x"))
    monkeypatch.setattr(launch, "private_superlink", lambda: nullcontext({}))
    given = "fraction-train=0.5 objective='erde' ema-decay=0.9"
    CliRunner().invoke(app, ["run", str(ROOT), "--run-config", given])
    assert seen == ['objective="erde"', "federation.fraction-train=0.5", "erde.ema-decay=0.9"]


def test_settings_go_to_other_processes():
    settings = Settings.from_run_config({"federation.fraction-train": 0.5, "method": "ditto", "ditto.pull": 0.2})
    assert pickle.loads(pickle.dumps(settings)) == settings
