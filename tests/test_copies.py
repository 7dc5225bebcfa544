"""Named copies of the trainable parameters: saved by value, used and left without a trace."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmalign.copies import Copies


@pytest.fixture
def module():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    layers[0].requires_grad_(False)
    return layers


def move(module: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(by)


def test_a_copy_is_used_and_the_live_values_come_back(module):
    x = torch.randn(5, 3)
    copies, before = Copies(module), module(x)
    copies.save("old")
    move(module)
    after = module(x)
    with copies.use("old"):
        assert torch.equal(module(x), before)
    assert torch.equal(module(x), after)
    assert not torch.equal(before, after)


def test_live_values_come_back_after_an_error(module):
    copies = Copies(module)
    copies.save("old")
    move(module)
    live = module[1].weight.clone()
    with pytest.raises(RuntimeError, match="inside"), copies.use("old"):
        raise RuntimeError("inside")
    assert torch.equal(module[1].weight, live)


def test_only_trainable_parameters_are_copied(module):
    copies = Copies(module)
    copies.save("old")
    assert [t.shape for t in copies.state_dict()["old"]] == [module[1].weight.shape, module[1].bias.shape]


def test_an_optimizer_still_moves_the_live_parameters_after_a_copy_was_used(module):
    copies = Copies(module)
    copies.save("old")
    saved = [t.clone() for t in copies.state_dict()["old"]]
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    loss = module(torch.ones(1, 3)).sum()
    with copies.use("old"), torch.no_grad():
        module(torch.ones(1, 3))
    loss.backward()
    optimizer.step()
    assert not torch.equal(module[1].bias, saved[1])
    assert_close(module[1].bias, saved[1] - 0.1)
    assert all(map(torch.equal, copies.state_dict()["old"], saved))


def test_copies_nest(module):
    copies = Copies(module)
    copies.save("first")
    move(module)
    copies.save("second")
    move(module)
    live = module[1].bias.clone()
    with copies.use("first"):
        with copies.use("second"):
            assert_close(module[1].bias, live - 1)
        assert_close(module[1].bias, live - 2)
    assert torch.equal(module[1].bias, live)


def test_an_average_follows_the_live_values(module):
    copies = Copies(module)
    copies.save("average")
    start = module[1].bias.clone()
    move(module)
    copies.follow("average", keep=0.75)
    copies.follow("average", keep=0.75)
    assert_close(copies.state_dict()["average"][1], start + 1 - 0.75**2)


def test_an_unknown_copy_names_the_known_ones(module):
    copies = Copies(module)
    copies.save("reference")
    assert "reference" in copies
    assert "old" not in copies
    with pytest.raises(KeyError, match=r"no copy named .old.; there are .*reference"), copies.use("old"):
        pass


def test_copies_are_saved_and_loaded_by_value(module):
    copies = Copies(module)
    copies.save("old")
    state = copies.state_dict()
    other = Copies(nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2)))
    other.load_state_dict(state)
    state["old"][0].add_(1)
    assert_close(other.state_dict()["old"][0], state["old"][0] - 1)


def test_copies_of_another_model_do_not_fit(module):
    copies = Copies(module)
    with pytest.raises(ValueError, match="'old' does not fit"):
        copies.load_state_dict({"old": [torch.zeros(3)]})
