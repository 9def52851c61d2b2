"""Profiles: the ones that come with the engine, and clear words for wrong ones."""

from __future__ import annotations

import pytest

from engine import profiles
from engine.levels.ordering import ByPriority, Fair, Fifo
from engine.limits import Limits
from engine.tasks import SECOND


def test_the_three_profiles_load() -> None:
    assert isinstance(profiles.load("fifo").ordering, Fifo)
    assert isinstance(profiles.load("kube-default").ordering, ByPriority)
    aigc = profiles.load("aigc")
    assert isinstance(aigc.ordering, Fair)
    assert aigc.ordering.age_us == 120 * SECOND
    assert aigc.preempt


def test_a_profile_can_be_given_as_text() -> None:
    profile = profiles.load(
        'name = "mine"\n[ordering]\npolicy = "fair"\nage_s = 1.5\n[placement]\nscorers = { spread = 2 }\n'
    )
    assert (profile.name, profile.ordering.age_us, profile.scorers) == ("mine", 1_500_000, (("spread", 2),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nosuch", "there is no profile 'nosuch'; use one of fifo, kube-default, aigc"),
        ("a = = 1", "no TOML"),
        ("[nolevel]\nx = 1", r"\[nolevel\]: there is no such level"),
        ("[binding]\nx = 1", "binding.x: there is no such key"),
        ("[binding]\nwarm_reuse = 1", "binding.warm_reuse: 1 is wrong; use true or false"),
        ("[binding]\nwarm_first_s = -1", "binding.warm_first_s: -1 is wrong; use seconds"),
        ("[placement]\nscorers = { luck = 1 }", "placement.scorers.luck: there is no such scorer"),
        ("[placement]\nscorers = 1", "placement.scorers: use a table"),
        ("[placement]\ncached_model_bonus = 1.5", "use a whole number"),
        ('[ordering]\npolicy = "luck"', "ordering.policy: 'luck' is unknown"),
        (
            '[ordering]\npolicy = "fifo"\npriority_step_s = 1',
            "ordering.priority_step_s: the policy 'fifo' has no such key",
        ),
        ("name = 1", "name: 1 is wrong; use a text"),
    ],
)
def test_what_is_wrong_in_a_profile_is_named(text: str, message: str) -> None:
    with pytest.raises(profiles.InvalidProfile, match=message):
        profiles.load(text)


def test_a_limit_must_be_a_bound() -> None:
    with pytest.raises(ValueError, match=r"Limits.claims: 0 is no bound"):
        Limits(claims=0)
