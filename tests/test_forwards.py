"""attach_exits on the forwards people write: cut right, or refused with the true reason (tests/forwards.py)."""

import copy
import pickle

import pytest
import torch
from forwards import CUT, REFUSED, Classifier
from torch import nn

from cafe_flwr.networks import attach_exits

SHAPE = (3, 8, 8)


def attached(name):
    torch.manual_seed(0)
    backbone = Classifier(*CUT[name]).eval()
    return backbone, attach_exits(backbone, ["first"], input_shape=SHAPE)


@pytest.mark.parametrize("name", CUT)
def test_the_last_exit_is_the_backbone(name):
    """Same logits for all batches, the backbone's tensors and no others, and gradients into all that is used."""
    backbone, network = attached(name)
    for size in (1, 2, 5):
        x = torch.rand(size, *SHAPE)
        with torch.no_grad():
            torch.testing.assert_close(network(x)[-1], backbone(x), rtol=1e-5, atol=1e-6)
    in_stages = {n.split(".", 2)[2] for n in network.state_dict() if n.startswith("stages.")}
    assert in_stages <= set(backbone.state_dict())
    x = torch.rand(4, *SHAPE)
    trained = copy.deepcopy(backbone).train()
    trained(x).sum().backward()
    network.train()(x)[-1].sum().backward()
    for own, parameter in trained.named_parameters():
        if parameter.grad is not None and not own.startswith(("fc", "register")):
            ours = [p for n, p in network.named_parameters() if n.startswith("stages.") and n.split(".", 2)[2] == own]
            assert ours
            assert all(p.grad is not None for p in ours), own


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_said_with_its_reason(name):
    forward, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        attach_exits(Classifier(forward), ["first"], input_shape=SHAPE)


@pytest.mark.parametrize("name", ["functional", "another factor in training", "functional batch norm"])
def test_what_follows_the_mode_follows_it_after_the_cut(name):
    _, network = attached(name)
    x = torch.rand(4, *SHAPE)
    with torch.no_grad():
        assert not torch.equal(network.train()(x)[-1], network.eval()(x)[-1])


def test_constants_move_with_the_network_and_stay_out_of_its_state():
    _, network = attached("tensor that is an attribute")
    moved = copy.deepcopy(network).double()
    assert moved(torch.rand(2, *SHAPE, dtype=torch.float64))[-1].dtype == torch.float64
    assert pickle.loads(pickle.dumps(network)).state_dict().keys() == network.state_dict().keys()


def test_random_numbers_are_drawn_at_every_call():
    network = attach_exits(
        Classifier(lambda m, x: m.fc(m.second(m.first(x)).mean((2, 3)) + 0 * torch.rand(4))), ["first"], example=X
    )
    before = torch.get_rng_state()
    network(X)
    assert not torch.equal(torch.get_rng_state(), before)


X = torch.rand(2, *SHAPE)
WRONG = {
    "no parameters": (nn.Flatten(), {}, "Flatten does not end in a linear classifier"),
    "no example": (Classifier(CUT["reshape"][0], 256), {"example": [1.0]}, "example must be a tensor, a batch"),
    "empty": (Classifier(CUT["reshape"][0], 256), {"input_shape": ()}, "does not take an input of shape"),
    "negative": (Classifier(CUT["reshape"][0], 256), {"input_shape": (3, -8, 8)}, "input_shape must be"),
    **{
        f"{name}={value!r}": (
            Classifier(CUT["reshape"][0], 256),
            {name: value},
            f"{name} must be a whole number from 1",
        )
        for name in ("num_classes", "features")
        for value in (0, -1, 2.5, True, "3")
    },
}


@pytest.mark.parametrize("what", WRONG)
def test_values_that_cannot_be_are_refused(what):
    backbone, options, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        attach_exits(backbone, ["first"], **{"input_shape": SHAPE, **options})
