"""The text task that is always there, and the tokens that texts become."""

import re
from collections import Counter

import numpy as np
import pytest
import torch

from cafe_flwr.data import docstrings, load_federation
from cafe_flwr.data.docstrings import PACKAGES, draw, sentences
from cafe_flwr.data.tokenizer import Tokenizer, words

OPTIONS = {"alpha": 0.5, "examples_per_client": 60, "max_tokens": 20, "vocabulary": 3000}


def clients_of(federation):
    return [federation.load(client) for client in range(federation.num_clients)]


def splits_of(client):
    return {"train": client.train, "calibration": client.calibration, "test": client.test}


# --- sentences ---


@pytest.mark.slow
def test_every_package_has_hundreds_of_sentences_all_different():
    data = sentences()
    assert len(set(data.texts)) == len(data.texts) == len(data.labels) == len(data.modules)
    assert np.bincount(data.labels, minlength=len(PACKAGES)).min() >= 500


@pytest.mark.slow
def test_no_sentence_names_a_package():
    named = Counter(word for text in sentences().texts for word in words(text.replace("_", "x")) if word in PACKAGES)
    assert not named


def test_they_are_sentences():
    for text in sentences().texts:
        assert re.match(r".*[.!?]$", text)
        assert ">>>" not in text
        assert len(text.split()) <= 60


def test_only_modules_docstrings_are_read_and_nothing_is_imported(tmp_path, monkeypatch):
    """A package made for the test: its sentences come in the docstrings of a module, a class and a method."""
    package = tmp_path / "made"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(
        '"""The module tells a story in one sentence.\n\n>>> Code is not among them, as numpy is not.\n"""\n'
        "raise SystemExit('imported')\n"
        'class A:\n    """The class tells another story, of numpy and more. It has two sentences in all of it."""\n'
        '    def f(self):\n        """Short one."""\n        """A string is no docstring, however long it may be."""\n'
    )
    (package / "tests" / "test_a.py").write_text('"""Tests are not read, whatever they may have to say."""\n')
    (package / "broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = [text for file in docstrings._sources("made") for text in docstrings._sentences_of(file)]
    assert found == [
        "The module tells a story in one sentence.",
        "The class tells another story, of  and more.",
        "It has two sentences in all of it.",
    ]


def test_a_sentence_that_two_packages_say_belongs_to_none(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / f"made_{name}").mkdir()
        (tmp_path / f"made_{name}" / "__init__.py").write_text(
            f'"""Both of them say this very same sentence. Only one of them says {name} twice, {name}."""\n'
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(docstrings, "PACKAGES", ("made_one", "made_two"))
    assert sentences.__wrapped__().texts == (
        "Only one of them says one twice, one.",
        "Only one of them says two twice, two.",
    )
    monkeypatch.setattr(docstrings, "PACKAGES", ("made_one", "made_three"))
    with pytest.raises(ValueError, match="needs the sources of made_three"):
        sentences.__wrapped__()


# --- dealt out ---


def test_no_module_is_in_two_splits_over_all_clients():
    modules = sentences().modules
    seen = {"train": set(), "calibration": set(), "test": set()}
    for client in clients_of(load_federation("docstrings", 10, **OPTIONS)):
        for name, split in splits_of(client).items():
            seen[name] |= set(modules[split.source[:, 0].numpy()].tolist())
    assert all(seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["calibration"]
    assert not seen["test"] & seen["calibration"]


def test_every_sentence_is_dealt_out_at_most_once_with_its_own_tokens_and_label():
    data, rows = sentences(), []
    tokenizer = Tokenizer(20, 3000)
    federation = load_federation("docstrings", 10, **OPTIONS)
    assert (federation.class_names, federation.input_shape, federation.vocabulary) == (PACKAGES, (20,), 3000)
    for client in clients_of(federation):
        for split in splits_of(client).values():
            own = split.source[:, 0].tolist()
            assert torch.equal(split.x, tokenizer([data.texts[row] for row in own]))
            assert split.y.tolist() == data.labels[own].tolist()
            rows += own
    assert len(set(rows)) == len(rows) == 600
    assert np.bincount(data.labels[rows]).tolist() == [50] * 12


def test_shares_are_about_those_asked_for_in_every_package():
    rows, splits = draw(2400, (0.5, 0.2, 0.3), seed=0)
    labels = sentences().labels[rows]
    for label in range(len(PACKAGES)):
        counts = np.bincount(splits[labels == label], minlength=3)
        assert counts.sum() == 200
        assert np.abs(counts / 200 - (0.5, 0.2, 0.3)).max() < 0.12
    everything, _ = draw(10**6, (0.5, 0.2, 0.3), seed=0)
    assert len(everything) == len(sentences().texts)


def test_the_draw_depends_on_the_seed_only():
    first, again, other = (draw(600, (0.5, 0.2, 0.3), seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_label_groups_and_validation_work_on_texts_and_rotations_are_refused():
    federation = load_federation("docstrings", 6, label_groups=2, validation_share=0.25, **OPTIONS)
    _, splits = draw(360, (0.48, 0.12, 0.40), seed=0)
    assert all(len(client.train) > len(client.test) > 0 for client in clients_of(federation))
    assert (splits == 2).sum() > 100  # what no client has been given
    given = sum(len(split) for client in clients_of(federation) for split in splits_of(client).values())
    assert given == (splits != 2).sum()
    with pytest.raises(ValueError, match=r"data.rotations needs images"):
        load_federation("docstrings", 6, rotations=2, **OPTIONS)
    with pytest.raises(ValueError, match=r"data.test-shift is for .*not 'docstrings'"):
        load_federation("docstrings", 6, test_shift=0.5, **OPTIONS)


# --- tokens ---


def test_equal_words_have_equal_tokens_wherever_they_stand_and_0_is_padding():
    tokens = Tokenizer(6, 8192)(["The cat saw the dog", "THE DOG!", "", "..."])
    assert tokens.shape == (4, 6)
    assert tokens[0, 0] == tokens[0, 3] == tokens[1, 0]
    assert tokens[0, 4] == tokens[1, 1]
    assert len({int(t) for t in tokens[0, :5]}) == 4
    assert tokens[1, 2:].tolist() == [0] * 4
    assert tokens[2].tolist() == tokens[3].tolist() == [0] * 6


def test_no_word_is_padding_and_all_tokens_are_used():
    tokens = Tokenizer(1, 50)([f"word{k}" for k in range(2000)])
    assert sorted(set(tokens.flatten().tolist())) == list(range(1, 50))


def test_long_texts_are_cut_from_the_end_or_refused():
    text = "one two three four"
    assert torch.equal(Tokenizer(3)([text]), Tokenizer(3)(["one two three"]))
    Tokenizer(4, cut=False)([text])
    with pytest.raises(
        ValueError, match=r"has 4 words, more than the 3 that are taken \('one two three four'…\): raise"
    ):
        Tokenizer(3, cut=False)([text])


def test_no_texts_are_no_rows():
    assert Tokenizer(7)([]).shape == (0, 7)
