"""Measures of token samples: distinct n-grams, perplexity, and task measures by library code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdt_dist.extras import packages_of


def distinct_n(samples: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of the samples (Li et al. 2016); 0 without any."""
    grams = []
    for sample in samples:
        starts = range(len(sample) - n + 1)
        grams += [tuple(sample[i : i + n]) for i in starts]
    if not grams:
        return 0.0
    return len(set(grams)) / len(grams)


def perplexity(log_probs: Sequence[float], lengths: Sequence[int]) -> float:
    """exp of minus the mean log p per answer token over all samples; the prompt never counts."""
    num_tokens = max(1, np.sum(lengths))
    mean = np.sum(log_probs) / num_tokens
    return float(np.exp(-mean))


def classification(predicted: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Accuracy, macro-F1 and Cohen's kappa; kappa is 1 where all labels, predicted and true, are one class."""
    with packages_of("text", "classification"):
        from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score

    accuracy = accuracy_score(truth, predicted)
    macro_f1 = f1_score(truth, predicted, average="macro")
    labels = sorted({*predicted, *truth})
    kappa = 1.0
    if len(labels) > 1:
        kappa = cohen_kappa_score(truth, predicted, labels=labels)
    return {
        "accuracy": float(accuracy),
        "macro_f1": float(macro_f1),
        "kappa": float(kappa),
    }


def generation(predicted: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU (0 to 100, sacreBLEU) and ROUGE-L (F measure).

    BLEU takes the n-gram orders that the answers are long enough for, so that a perfect answer of one word scores 100.
    """
    with packages_of("text", "generation"):
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu import corpus_bleu

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = []
    for answer, reference in zip(predicted, references, strict=True):
        scores = scorer.score(reference, answer)
        rouge.append(scores["rougeL"].fmeasure)
    bleu = corpus_bleu(list(predicted), [list(references)], use_effective_order=True)
    return {"bleu": float(bleu.score), "rouge_l": float(np.mean(rouge))}
