"""The computed sentences of the lessons: facts in, text out. Shares and probabilities are in [0, 1]."""

from __future__ import annotations

import math

from distillery.wording import percent


def soft_rows_sentence(share: float, threshold: float) -> str:
    """share: of the rows whose second label has at least `threshold`."""
    text = f"On {percent(share)} of the rows the teacher gives its second label at least {threshold:.2f}: "
    if share > 0.1:
        return text + "a hard label would throw this away."
    return text + "its soft labels are almost hard, and soften only at a higher temperature."


def entropy_sentence(at_one: float, at_high: float, temperature: float) -> str:
    """Mean entropies of the soft labels, in nats, at T = 1 and at `temperature`."""
    change = f"Mean entropy goes from {at_one:.2f} nats at T = 1 to {at_high:.2f} at T = {temperature:g}: "
    return change + ("softer labels." if at_high > at_one else "**harder** labels, T is below 1.")


def neighbour_sentence(label: str, masses: dict[str, float]) -> str:
    """masses: the mean probabilities of the two labels other than `label` on rows of it, the larger one first."""
    (first, first_mass), (second, second_mass) = masses.items()
    text = f"On rows that the teacher calls {label}, {first} gets {first_mass:.2f} and {second} {second_mass:.2f}: "
    if first_mass > 1.2 * second_mass:
        return text + f"{label} is closer to {first}, which no hard label holds."
    return text + "both errors are about as likely, so the soft label shows no closer one."


def gradient_sentence(without: float, with_factor: float, temperature: float) -> str:
    """Gradient norms at `temperature` relative to T = 1, without and with the factor T**2."""
    text = f"At T = {temperature:g} the gradient is {without:.3f} times that at T = 1; with the factor $T^2$ it is "
    text += f"{with_factor:.2f} times. "
    if abs(with_factor - 1) < abs(without - 1):
        return text + "So the factor keeps the learning rate valid when the temperature changes."
    return text + "Here the factor does **not** bring it nearer to 1."


def soft_against_hard_sentence(soft: float, hard: float, error: float) -> str:
    """Accuracies of students on soft and hard labels, and the standard error of one accuracy."""
    gain = soft - hard
    text = f"Soft labels give {percent(soft)}, hard labels {percent(hard)} (standard error {100 * error:.1f} points): "
    if abs(gain) < 2 * error:
        return text + "the difference is smaller than two standard errors, this test set shows no winner."
    return text + f"soft labels are {abs(100 * gain):.1f} points {'better' if gain > 0 else '**worse**'}."


def divergence_sentence(forward: float, reverse: float) -> str:
    """KL(p || s) and KL(s || p) of the same pair, in nats."""
    text = f"KL(p‖s) is {forward:.3f} nats, KL(s‖p) {reverse:.3f}: "
    if abs(forward - reverse) < 1e-6:
        return text + "here the two directions agree, which is rare."
    worse = "the labels that the student misses" if forward > reverse else "the labels that the student invents"
    return text + f"KL is not symmetric, and here {worse} cost more."


def denominator_sentence(one_batch: float, summed: float, mean_of_means: float) -> str:
    """The loss of one batch, of micro-batches with one denominator, and the mean of the micro-batches' means."""
    same = abs(one_batch - summed) < 1e-5
    text = f"One batch {one_batch:.4f}; micro-batches with one denominator {summed:.4f}: "
    text += "equal. " if same else "**not** equal. "
    if abs(mean_of_means - one_batch) < 1e-5:
        return (
            text + f"The mean of means, {mean_of_means:.4f}, agrees too, because all micro-batches are equally large."
        )
    return text + f"The mean of means is {mean_of_means:.4f}: it weighs rows of small micro-batches more."


def steps_sentence(difference: float, first: float, last: float) -> str:
    """Largest difference between the weights by hand and by autograd; first and last loss, in nats."""
    text = (
        f"The loss goes from {first:.3f} to {last:.3f} nats. The largest difference of any weight is {difference:.1e}: "
    )
    if difference < 1e-4:
        return text + "by hand and by autograd are the same training."
    return text + "by hand and by autograd are **not** the same training."


def memory_gap_sentence(in_sample: float, out_of_fold: float, held_out: float) -> str:
    """Accuracies on gold rows in sample and out of fold, and on held-out rows."""
    text = f"In sample {percent(in_sample)}, out of fold {percent(out_of_fold)}, on held-out rows {percent(held_out)}. "
    if abs(out_of_fold - held_out) < abs(in_sample - held_out):
        return text + f"Out of fold is nearer to the truth: {100 * (in_sample - out_of_fold):.1f} points were memory."
    return text + "Here the in-sample score is nearer to the truth: this teacher memorised nothing."


def confidence_gap_sentence(confidence: float, accuracy: float) -> str:
    """Mean confidence of in-sample signals beside the accuracy on held-out rows."""
    text = (
        f"In sample the teacher is {percent(confidence)} confident, and right on {percent(accuracy)} of held-out rows: "
    )
    if confidence > accuracy + 0.05:
        return text + "its signals claim more than it knows."
    return text + "its signals claim no more than it knows."


def folds_sentence(few: int, few_accuracy: float, many: int, many_accuracy: float) -> str:
    """Out-of-fold accuracies with few and many folds."""
    text = f"With {few} folds the out-of-fold accuracy is {percent(few_accuracy)}, with {many} it is "
    text += f"{percent(many_accuracy)}: "
    if many_accuracy > few_accuracy:
        return text + "each fold's teacher saw more rows. More folds cost more training runs."
    return text + "more folds gave nothing here, few are enough."


def group_sentence(by_row: float, by_group: float) -> str:
    """Out-of-fold accuracies on rows with a near-duplicate, with folds of single rows and of whole groups."""
    text = f"On rows that have a near-duplicate: folds of single rows {percent(by_row)}, of whole groups "
    text += f"{percent(by_group)}. "
    if abs(by_row - by_group) < 0.02:
        return text + "The two agree: here near-duplicates leak nothing that shows."
    if by_row > by_group:
        return text + "Single rows look better, because the teacher has seen a twin of the row."
    return text + "Single rows look **worse**: the twin that the teacher has seen bears another label."


def student_signal_sentence(in_sample: float, out_of_fold: float, error: float) -> str:
    """Accuracies of students taught in sample and out of fold, and the standard error of one accuracy."""
    gain = out_of_fold - in_sample
    text = f"The student of in-sample signals reaches {percent(in_sample)}, that of out-of-fold signals "
    text += f"{percent(out_of_fold)}: "
    if abs(gain) < error:
        return text + f"the difference is within one standard error ({100 * error:.1f} points)."
    return (
        text
        + f"out-of-fold signals are {abs(100 * gain):.1f} points {'better' if gain > 0 else '**worse**'} to learn from."
    )


def exposure_sentence(on_reference: float, on_own: float) -> str:
    """Mean JSD per token on reference texts and on the student's own texts, in nats."""
    text = (
        f"Teacher and student differ by {on_reference:.3f} nats a token on the corpus' texts, by {on_own:.3f} on the "
    )
    text += "student's own: "
    if on_own > on_reference:
        return text + "its own texts lead it to places that off-policy training does not correct."
    return text + "on its own texts the student is not further from the teacher."


def policy_sentence(off_policy: float, on_policy: float) -> str:
    """Mean JSD per token on own texts after training off- and on-policy, in nats."""
    text = f"After training, on each student's own texts: off-policy {off_policy:.3f} nats a token, on-policy "
    text += f"{on_policy:.3f}. "
    if on_policy < off_policy:
        text += "On-policy training comes nearer to the teacher on the texts that the student really writes"
    else:
        text += "Off-policy training comes nearer here: on-policy needs a student that already writes something useful"
    return text + "; one run is no evidence of more."


def modes_sentence(forward_mass: float, reverse_mass: float) -> str:
    """The student's probability between the teacher's two modes, after fitting with forward and reverse KL."""
    text = f"Between the teacher's two modes forward KL puts {forward_mass:.2f} of the mass, reverse KL "
    text += f"{reverse_mass:.2f}: "
    if forward_mass > reverse_mass:
        return text + "forward KL covers both modes, reverse KL chooses one."
    return text + "here reverse KL does **not** choose one mode."


def beta_sentence(beta: float, value: float, maximum_beta: float) -> str:
    """The JSD at a small `beta` in nats, and the beta of the largest JSD."""
    text = f"JSD is {value:.4f} nats at beta {beta:g} and largest near beta {maximum_beta:g}: "
    if value < 0.01:
        return text + "towards its ends it vanishes, and its gradient too. So the ends are refused: use KL there."
    return text + "at this end it is still large enough to train with."


def interval_sentence(by_row: float, by_group: float) -> str:
    """Widths of the bootstrap intervals of one accuracy, drawn by rows and by groups."""
    text = f"The interval is {100 * by_row:.1f} points wide by rows, {100 * by_group:.1f} by groups: "
    if by_group > 1.02 * by_row:
        return text + "near-duplicates are right or wrong together, so there are fewer independent rows than it seems."
    return text + "here groups change nothing, because few rows share one or they are not right together."


def paired_sentence(difference: float, low: float, high: float, p: float) -> str:
    """A paired difference of accuracies with its 95 % interval and p value."""
    text = f"The difference is {100 * difference:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f}, "
    text += f"p = {p:.3f}): "
    if p < 0.05:
        return (
            text + f"the gain is {'real' if difference > 0 else 'a real **loss**'} as far as test rows are concerned."
        )
    return text + "this is **no evidence** of a gain."


def pairing_sentence(paired: float, unpaired: float) -> str:
    """Standard errors of a difference, with the same rows for both models and with independent rows."""
    text = f"The standard error is {100 * paired:.2f} points paired and {100 * unpaired:.2f} unpaired: "
    if paired < 0.98 * unpaired:
        return text + f"pairing is worth {(unpaired / paired) ** 2:.1f} times as many test rows."
    return text + "pairing gives nothing here, the two models do not err on the same rows."


def power_sentence(rows: int, detectable: float, observed: float) -> str:
    """The smallest difference that `rows` test rows detect four times in five, and the one that was observed."""
    text = (
        f"With {rows:,} test rows a true difference of {100 * detectable:.1f} points is detected four times in five. "
    )
    if abs(observed) >= detectable:
        return text + f"The observed {100 * observed:+.1f} points are above that."
    return text + f"The observed {100 * observed:+.1f} points are below that: a larger test set is needed."


def seeds_sentence(spread: float, gain: float) -> str:
    """The standard deviation between training runs, and the gain of one run."""
    text = f"Between training runs the accuracy varies with a standard deviation of {100 * spread:.1f} points. "
    if abs(gain) > 2 * spread:
        return text + f"The gain of {100 * gain:+.1f} points is more than the choice of the run explains."
    return text + f"A gain of {100 * gain:+.1f} points of one run may be luck."


def two_tests_sentence(permutation: float, mcnemar: float) -> str:
    """p values of the permutation test and of the exact McNemar test."""
    text = (
        f"Permutation of groups gives p = {permutation:.3f}, the exact McNemar test of single rows p = {mcnemar:.3f}: "
    )
    if (permutation < 0.05) == (mcnemar < 0.05):
        return text + "both lead to the same decision at 0.05."
    return text + "they lead to **different** decisions at 0.05; the one that knows of groups counts."


def swap_sentence(share: float) -> str:
    """The share of random swaps with a difference at least as large as the observed one."""
    text = f"{percent(share)} of the swaps give a difference at least as large as the observed one: "
    return text + ("luck alone rarely does that." if share < 0.05 else "luck alone **does that too often**.")


def correction_sentence(before: float, after: float) -> str:
    """A p value before and after Holm's correction."""
    text = f"Correction raises p of the student from {before:.3f} to {after:.3f}: "
    if after < 0.05:
        return text + "the gain stands among this many comparisons."
    if before < 0.05:
        return text + "the gain **does not stand** among this many comparisons."
    return text + "there was no evidence before, and there is none after."


def calibration_gap_sentence(in_sample: float, out_of_fold: float) -> str:
    """Expected calibration errors in sample and out of fold."""
    text = f"Confidence is off by {100 * in_sample:.1f} points in sample and by {100 * out_of_fold:.1f} out of fold: "
    if in_sample < out_of_fold:
        return text + "in sample the teacher looks better calibrated than it is."
    return text + "in-sample signals are the worse calibrated ones."


def path_sentence(start: dict[str, float], largest_end: float) -> str:
    """start: each loss at the student's own logits. largest_end: the largest loss at the teacher's logits."""
    high, low = max(start, key=start.get), min(start, key=start.get)
    text = f"At the start `{high}` is largest ({start[high]:.2f}) and `{low}` smallest ({start[low]:.2f}). "
    if largest_end < 1e-6:
        return text + "At the end all of them are 0: they agree on the goal."
    return text + f"At the end one of them is still {largest_end:.2f}: it does **not** agree on the goal."


def learning_sentence(first: float, last: float, vocabulary: int) -> str:
    """First and last training loss of a language model, in nats a token."""
    text = f"The loss goes from {first:.2f} to {last:.2f} nats a token; guessing among {vocabulary} tokens costs "
    text += f"{math.log(vocabulary):.2f}. "
    if last < 0.8 * first:
        return text + "The model has learned to predict the next word."
    return text + "The model has **hardly** learned anything: give it more steps."


def token_sentence(tokens: list[str], values: list[float]) -> str:
    """Where teacher and student differ in a text. values: JSD at each token, in nats."""
    high = max(range(len(tokens)), key=lambda i: values[i])
    low = min(range(len(tokens)), key=lambda i: values[i])
    text = f"They differ most before `{tokens[high]}` ({values[high]:.2f} nats), least before `{tokens[low]}` "
    text += f"({values[low]:.2f}). "
    if values[high] < 0.1:
        return text + "Nowhere do they differ much: there is little left to learn from this text."
    return text + "The loss of the text is the mean of these bars."
