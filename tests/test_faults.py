"""TRL's faults: what its trainer gives, and what ours gives for the same (see `faults.py`)."""

from __future__ import annotations

import math

import pytest
import torch

import faults
from distillery import losses


@pytest.fixture
def figures(tiny_models, tmp_path):
    """A function that measures one case: (TRL's figures, ours)."""
    return lambda measure: measure(tiny_models, tmp_path)


def test_every_fault_has_a_test():
    assert {f"test_trl_fault_{case.name}" for case in faults.CASES} == {n for n in globals() if "trl_fault" in n}
    assert {case.number for case in faults.CASES} == set(range(9))


def test_trl_fault_on_policy_loss_is_divided_by_the_datasets_label_count(figures):
    theirs, ours = figures(faults.on_policy_loss_is_divided_by_the_datasets_label_count)
    assert theirs[1] / theirs[0] > 3 and theirs[2] / theirs[1] > 3  # the same model, only longer answers
    assert max(ours) / min(ours) < 1.3


def test_trl_fault_temperature_never_reaches_the_loss(figures):
    theirs, ours = figures(faults.temperature_never_reaches_the_loss)
    assert theirs[0] == theirs[1]  # the trainer's loss does not change at all
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1] < 0.6 * ours[0]


def test_trl_fault_beta_jumps_at_its_ends(figures):
    theirs, ours = figures(faults.beta_jumps_at_its_ends)
    assert theirs[0] / theirs[1] > 50 and theirs[3] / theirs[2] > 50
    assert ours[1] == pytest.approx(ours[0], rel=0.15) and ours[2] == pytest.approx(ours[3], rel=0.15)
    student, teacher = faults.pair(50)
    for end, near in ((0, 0.01), (1, 0.99)):
        nearer = near + (end - near) * 0.99
        at_end = losses.jsd(student, teacher, beta=end, scaled=True).mean().item()
        assert losses.jsd(student, teacher, beta=nearer, scaled=True).mean().item() == pytest.approx(at_end, rel=0.01)
    assert losses.jsd(student, teacher, beta=0, scaled=True).equal(losses.kl(student, teacher))
    assert losses.jsd(student, teacher, beta=1, scaled=True).equal(losses.reverse_kl(student, teacher))
    # The plain divergence is TRL's inside, and refuses the ends, where its own limit is a loss that trains nothing.
    plain = faults.GKDTrainer.generalized_jsd_loss(student, teacher, torch.zeros(4), 0.01).item()
    assert losses.jsd(student, teacher, beta=0.01).mean().item() == pytest.approx(plain, abs=1e-12)
    for end, instead in ((0.0, "kl"), (1.0, "reverse_kl")):
        with pytest.raises(ValueError, match=f"at {end:g} use {instead}"):
            losses.jsd(student, teacher, beta=end)


def test_trl_fault_no_cross_entropy_term(figures):
    theirs, ours = figures(faults.no_cross_entropy_term)
    assert theirs[0] == theirs[1]
    assert abs(ours[0] - ours[1]) > 0.01


def test_trl_fault_a_long_text_pushes_the_instruction_out(figures):
    theirs, ours = figures(faults.a_long_text_pushes_the_instruction_out)
    assert theirs[0] > 20 and theirs[1] == 0
    assert ours[1] == ours[0] == theirs[0]


def test_trl_fault_a_generation_prompt_of_its_own_masks_the_answers(figures):
    theirs, ours = figures(faults.a_generation_prompt_of_its_own_masks_the_answers)
    assert theirs == [0, 0.0]  # no word of it: the loss is 0 and nothing is learned
    assert ours[0] == 8 and ours[1] > 0.01  # four answers of one token, with their ends


def test_trl_fault_every_position_goes_through_both_heads(figures):
    theirs, ours = figures(faults.every_position_goes_through_both_heads)
    assert theirs[0] == theirs[1] > 20 * theirs[2]
    assert ours == [8, 0, 8]


def test_trl_fault_padded_vocabularies_are_refused(figures, tmp_path):
    theirs, ours = figures(faults.padded_vocabularies_are_refused)
    assert math.isnan(theirs[0]) and ours[0] > 0
    with pytest.raises(ValueError, match="vocab_size"):
        faults.letters(tmp_path, teacher=faults.llama(1, vocabulary=24))


def test_trl_fault_sequence_distillation_writes_anew_in_every_step(figures):
    theirs, ours = figures(faults.sequence_distillation_writes_anew_in_every_step)
    assert theirs == [2, 6] and ours == [1, 1]


def test_trl_fault_a_zero_probability_gives_nan(figures):
    theirs, ours = figures(faults.a_zero_probability_gives_nan)
    assert math.isnan(theirs[0]) and math.isfinite(ours[0])
