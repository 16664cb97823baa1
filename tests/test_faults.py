"""TRL's faults: the figures of its trainer, and of this package's for the same input (see `faults.py`)."""

from __future__ import annotations

import math

import pytest
import torch

import faults
from distillery import losses


@pytest.fixture
def figures(tiny_models, tmp_path):
    """A function that measures one case: (TRL's figures, own)."""
    return lambda measure: measure(tiny_models, tmp_path)


def test_every_fault_has_a_test():
    assert {f"test_trl_fault_{case.name}" for case in faults.CASES} == {n for n in globals() if "trl_fault" in n}
    assert {case.number for case in faults.CASES} == set(range(9))


def test_trl_fault_on_policy_loss_is_divided_by_the_datasets_label_count(figures):
    trl, own = figures(faults.on_policy_loss_is_divided_by_the_datasets_label_count)
    assert trl[1] / trl[0] > 3 and trl[2] / trl[1] > 3  # the same model, only longer answers
    assert max(own) / min(own) < 1.3


def test_trl_fault_temperature_never_reaches_the_loss(figures):
    trl, own = figures(faults.temperature_never_reaches_the_loss)
    assert trl[0] == trl[1]  # the trainer's loss does not change at all
    assert own[0] == pytest.approx(trl[0], rel=1e-5)
    assert own[1] < 0.6 * own[0]


def test_trl_fault_beta_jumps_at_its_ends(figures):
    trl, own = figures(faults.beta_jumps_at_its_ends)
    assert trl[0] / trl[1] > 50 and trl[3] / trl[2] > 50
    assert own[1] == pytest.approx(own[0], rel=0.15) and own[2] == pytest.approx(own[3], rel=0.15)
    student, teacher = faults.pair(50)
    for end, near in ((0, 0.01), (1, 0.99)):
        nearer = near + (end - near) * 0.99
        at_end = losses.jsd(student, teacher, beta=end, scaled=True).mean().item()
        assert losses.jsd(student, teacher, beta=nearer, scaled=True).mean().item() == pytest.approx(at_end, rel=0.01)
    assert losses.jsd(student, teacher, beta=0, scaled=True).equal(losses.kl(student, teacher))
    assert losses.jsd(student, teacher, beta=1, scaled=True).equal(losses.reverse_kl(student, teacher))
    # The plain divergence is TRL's inside. At the ends its limit is 0, a loss that trains nothing: they are an error.
    plain = faults.GKDTrainer.generalized_jsd_loss(student, teacher, torch.zeros(4), 0.01).item()
    assert losses.jsd(student, teacher, beta=0.01).mean().item() == pytest.approx(plain, abs=1e-12)
    for end, term in ((0.0, "kl"), (1.0, "reverse_kl")):
        with pytest.raises(ValueError, match=f"at {end:g} use {term}"):
            losses.jsd(student, teacher, beta=end)


def test_trl_fault_no_cross_entropy_term(figures):
    trl, own = figures(faults.no_cross_entropy_term)
    assert trl[0] == trl[1]
    assert abs(own[0] - own[1]) > 0.01


def test_trl_fault_a_long_text_pushes_the_instruction_out(figures):
    trl, own = figures(faults.a_long_text_pushes_the_instruction_out)
    assert trl[0] > 20 and trl[1] == 0
    assert own[1] == own[0] == trl[0]


def test_trl_fault_a_generation_prompt_of_its_own_masks_the_answers(figures):
    trl, own = figures(faults.a_generation_prompt_of_its_own_masks_the_answers)
    assert trl == [0, 0.0]  # without any warning: the loss is 0 and nothing is learned
    assert own[0] == 8 and own[1] > 0.01  # four answers of one token, with their ends


def test_trl_fault_every_position_goes_through_both_heads(figures):
    trl, own = figures(faults.every_position_goes_through_both_heads)
    assert trl[0] == trl[1] > 20 * trl[2]
    assert own == [8, 0, 8]


def test_trl_fault_padded_vocabularies_are_refused(figures, tmp_path):
    trl, own = figures(faults.padded_vocabularies_are_refused)
    assert math.isnan(trl[0]) and own[0] > 0
    with pytest.raises(ValueError, match="vocab_size"):
        faults.letters(tmp_path, teacher=faults.llama(1, vocabulary=24))


def test_trl_fault_sequence_distillation_writes_anew_in_every_step(figures):
    trl, own = figures(faults.sequence_distillation_writes_anew_in_every_step)
    assert trl == [2, 6] and own == [1, 1]


def test_trl_fault_a_zero_probability_gives_nan(figures):
    trl, own = figures(faults.a_zero_probability_gives_nan)
    assert math.isnan(trl[0]) and math.isfinite(own[0])


def test_the_newer_trainer_of_trl_has_mended_two_faults_and_kept_two(tmp_path):
    figures = {name: measure(tmp_path) for name, measure in faults.DISTILLATION_TRAINER.items()}
    lengths = figures["on_policy_loss_is_divided_by_the_datasets_label_count"]
    assert max(lengths) / min(lengths) < 2  # three to four times as many tokens, and the loss stays
    first, softened = figures["temperature_never_reaches_the_loss"]
    assert softened < 0.6 * first
    at_zero, near_zero, near_one, at_one = figures["beta_jumps_at_its_ends"]
    assert at_zero / near_zero > 20 and at_one / near_one > 20
    assert math.isnan(figures["padded_vocabularies_are_refused"][0])
    assert set(figures) <= {case.name for case in faults.CASES}
