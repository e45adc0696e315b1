"""Settings of version 0.1.0: nothing of then passes for what has its name today, and what was meant is said."""

import json

import pytest
from federations import results_of, run_small, small_settings

from cafe_flwr.app.run import open_results_of
from cafe_flwr.core.older_settings import METHODS_THEN, RENAMED, of_saved_run, renamed
from cafe_flwr.experiments.file import read_experiment
from cafe_flwr.experiments.plan import check_experiment
from cafe_flwr.methods import METHODS
from cafe_flwr.personal import FinishedRun
from cafe_flwr.settings import FORMER, OPTIONS, Settings, todays

TODAY = set(OPTIONS) | set(FORMER)
# Of the settings that version 0.1.0 wrote into settings.json, those that have changed, with their defaults of then.
THEN = {
    "mu": 0.5,
    "distill-weight": 1.0,
    "temperature": 3.0,
    "selection": "shallow-first",
    "teachers": "matched",
    "peers": "all",
    "similarity-proxy": "parameters",
    "solver": "exact",
    "max-staleness": 0,
    "objective-teacher": "ema",
    "plus-prior": True,
    "plus-mu": 0.1,
    "plus-pull": 1.0,
    "plus-distill-weight": 1.0,
    "plus-last-weight": 0.3,
    "plus-temperature": 3.0,
    "plus-selection": "none",
    "plus-backbone-pull": 0.5,
    "plus-match-by": "features",
    "plus-same-above": 0.6,
    "plus-counts": "exact",
    "plus-count-epsilon": 1.0,
}


def of_version_0_1_0(settings):
    """What that version wrote into settings.json: flat names, and none that came later."""
    later = ("cafedistill-text.", "cafedistill-prior.", "train.classifier-start")
    saved = {key: value for key, value in settings.to_run_config().items() if not key.startswith(later)}
    return {OPTIONS[key].formerly or key: value for key, value in saved.items()} | THEN


@pytest.mark.parametrize("key", sorted(RENAMED))
def test_an_old_name_is_refused_with_the_one_it_has_now(key):
    """The new one is a setting, of the method named, and takes the old default; the old one is none."""
    now = RENAMED[key]
    assert key not in TODAY
    method = now.partition(".")[0]
    with pytest.raises(
        ValueError, match=f"^unknown setting '{key}': its name is '{now}' now: it is of method '{method}'"
    ):
        Settings.from_run_config({key: THEN[key]})
    assert Settings.from_run_config({"method": method, now: THEN[key]}).to_run_config()[now] == THEN[key]
    assert Settings().to_run_config()[now] == THEN[key]


def test_every_old_name_is_known():
    """Those that are settings still are read by other methods than of old."""
    assert set(RENAMED) == set(THEN) - TODAY
    for then, now in METHODS_THEN.items():
        assert {then, now} <= set(METHODS)


def test_the_sentences():
    assert renamed("teachers") == (
        "its name is 'cafedistill-text.teachers' now: it is of method 'cafedistill-text', "
        "which was called 'cafedistill' until 0.1.0"
    )
    assert renamed("plus-mu") == (
        "its name is 'cafedistill-prior.mu' now: it is of method 'cafedistill-prior', "
        "which was called 'cafedistill-plus' until 0.1.0"
    )
    assert renamed("mu") == renamed("cafedistill-text.mu") == renamed("zzz") == ""


@pytest.mark.parametrize(
    ("key", "value", "now"),
    [("teachers", "own", "cafedistill-text.teachers"), ("plus-mu", 0.3, "cafedistill-prior.mu")],
)
@pytest.mark.parametrize("where", ["all", "row", "vary", "sweep"])
def test_an_experiment_of_then_is_refused_when_it_is_read_or_planned(tmp_path, key, value, now, where):
    """Wherever it has the setting."""
    row = {"method": "cafedistill" if key == "teachers" else "cafedistill-plus"}
    content = {"name": "old", "seeds": [0], "rows": [row]}
    match where:
        case "all":
            content["settings"] = {key: value}
        case "row":
            row["settings"] = {key: value}
        case "vary":
            content["vary"] = {key: [value]}
        case "sweep":
            content["sweep"] = {"seeds": [1000], "trials": {key: [value]}}
    path = tmp_path / "old.yaml"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"'{key}': its name is '{now}' now"):
        check_experiment(read_experiment(path), tmp_path)


def test_a_saved_run_of_another_method_is_read_as_it_was_meant():
    """Classifiers started as built then, and what other methods' settings were does not matter."""
    saved = of_version_0_1_0(Settings(method="fedavg")) | {"selection": "random"}
    settings = Settings.from_run_config(of_saved_run(saved))
    assert settings == Settings(method="fedavg", train={"classifier_start": "built"})
    assert of_saved_run(saved)["train.classifier-start"] == "built"
    settings.check_read()


@pytest.mark.parametrize(("then", "now"), METHODS_THEN.items())
def test_a_saved_run_of_a_method_that_means_another_now_is_refused(then, now):
    with pytest.raises(ValueError, match=f"method = '{then}' in settings of version 0.1.0 or before is '{now}' now"):
        of_saved_run({**THEN, "method": then})


def test_the_default_method_of_then_is_refused_too():
    """settings.json has all settings, yet nobody may go on with another method because a line was taken out."""
    with pytest.raises(ValueError, match="'cafedistill-text' now"):
        of_saved_run(THEN)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_todays_settings_are_left_alone(method):
    saved = Settings(method=method).to_run_config()
    assert of_saved_run(saved) == saved


@pytest.mark.usefixtures("no_report")
def test_the_folder_of_an_old_run_is_read_but_not_gone_on_with_by_another_method(tmp_path):
    """Of fedper: read, with classifiers as built. Of cafedistill: the sentence, also when it is to be resumed."""
    settings = small_settings(tmp_path, num_server_rounds=2, method="fedper", classifier_start="built")
    run_small(settings)
    path = settings.results / "settings.json"
    assert todays(json.loads(path.read_text())) == settings.to_run_config()
    old = of_version_0_1_0(settings)
    path.write_text(json.dumps(old))
    assert FinishedRun(settings.results).run_config["train.classifier-start"] == "built"
    again = settings.model_copy(update={"resume": True})
    with results_of(again) as results:
        assert results.state.round == 2

    path.write_text(json.dumps({**old, "method": "cafedistill"}))
    with pytest.raises(ValueError, match="'cafedistill-text' now"):
        _ = FinishedRun(settings.results).run_config
    with pytest.raises(ValueError, match=r"cannot resume .*'cafedistill-text' now"):
        open_results_of(again.model_copy(update={"method": "cafedistill"}))
