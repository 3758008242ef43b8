"""Measures of token samples: distinct n-grams, perplexity, and task measures by library code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdt_dist.extras import packages_of


def distinct_n(samples: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of the samples (Li et al. 2016); 0 without any."""
    grams = [tuple(sample[i : i + n]) for sample in samples for i in range(len(sample) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def perplexity(log_probs: Sequence[float], lengths: Sequence[int]) -> float:
    """exp of minus the mean log p per answer token over all samples; the prompt never counts."""
    return float(np.exp(-np.sum(log_probs) / max(1, np.sum(lengths))))


def classification(predicted: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Accuracy, macro-F1 and Cohen's kappa; kappa is 1 where all labels, predicted and true, are one class."""
    with packages_of("text", "classification"):
        from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score

    labels = sorted({*predicted, *truth})
    kappa = cohen_kappa_score(truth, predicted, labels=labels) if len(labels) > 1 else 1.0
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro")),
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
    rouge = [
        scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predicted, references, strict=True)
    ]
    bleu = corpus_bleu(list(predicted), [list(references)], use_effective_order=True)
    return {"bleu": float(bleu.score), "rouge_l": float(np.mean(rouge))}
