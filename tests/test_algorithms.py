"""The table of algorithms: known names, real TRL fields, functions that fit the trainer's call."""

import dataclasses

import pytest
import torch
from trl import GRPOConfig

from agentr1.algorithms import ALGORITHMS, algorithm


def test_the_table_holds_the_paper_s_critic_free_algorithms():
    assert set(ALGORITHMS) >= {"grpo", "rloo", "reinforce++", "reinforce++_baseline"}
    assert all(row.name == name for name, row in ALGORITHMS.items())
    assert all("arXiv" in row.paper for row in ALGORITHMS.values())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_setting_is_a_field_of_trl_s_config(name):
    fields = {field.name for field in dataclasses.fields(GRPOConfig)}
    assert set(algorithm(name).settings) <= fields


@pytest.mark.parametrize("name", ALGORITHMS)
def test_trl_accepts_the_settings(name, tmp_path):
    row = algorithm(name)
    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        bf16=False,
        use_cpu=True,
        **row.settings,
    )
    assert all(getattr(config, key) == value for key, value in row.settings.items())


@pytest.mark.parametrize("name", [n for n, a in ALGORITHMS.items() if a.outcome_advantage])
def test_an_outcome_advantage_maps_a_batch_to_a_batch(name):
    function = algorithm(name).outcome_advantage
    assert function is not None
    advantages = function(torch.tensor([0.0, 1.0, 0.0, 0.0]), 2)
    assert advantages.shape == (4,)
    assert advantages.argmax() == 1


def test_only_algorithms_that_compare_within_a_prompt_need_a_group():
    """Without a group, swapping rows between prompts must not matter; with one, it must."""
    rewards = torch.tensor([0.0, 1.0, 3.0, 5.0])
    swap = torch.tensor([2, 1, 0, 3])
    for row in ALGORITHMS.values():
        if row.outcome_advantage is None:
            continue
        straight = row.outcome_advantage(rewards, 2)[swap]
        swapped = row.outcome_advantage(rewards[swap], 2)
        assert torch.allclose(straight, swapped) is not row.needs_group, row.name


def test_rloo_keeps_a_normaliser_that_does_not_depend_on_lengths():
    assert algorithm("rloo").settings["loss_type"] == "dr_grpo"


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'reinforce'.*'grpo', 'reinforce\+\+'"):
        algorithm("reinforce")
