"""A learned solver that reads the question and sees nothing: logistic regression on runs of one to three words.

Where it stays at chance, the words of a question do not give its answer away; that it can learn is shown on planted leaks.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression


def _features(texts: Sequence[str], half: int):
    words = CountVectorizer(ngram_range=(1, 3), min_df=3, token_pattern=r"[A-Za-z0-9]+", binary=True)
    return words.fit_transform(texts[:half]), words.transform(texts[half:])


def label_accuracy(texts: Sequence[str], labels: Sequence[str]) -> tuple[float, float]:
    """(accuracy on the second half after learning from the first, share of the most frequent label there)."""
    half, labels = len(texts) // 2, np.asarray(labels)
    seen, asked = _features(texts, half)
    model = LogisticRegression(C=0.3, max_iter=300).fit(seen, labels[:half])
    _, counts = np.unique(labels[half:], return_counts=True)
    return float(np.mean(model.predict(asked) == labels[half:])), float(counts.max() / counts.sum())


def choice_accuracy(questions: Sequence[str], choices: Sequence[Sequence[str]], right: Sequence[int]) -> float:
    """Accuracy on the second half, each option scored by its words, its place and the words of the question beside it."""
    half = len(questions) // 2
    width = len(choices[0])
    rows = [
        f"{question} {' '.join(f'{word}option' for word in option.split())} place{k}"
        + "".join(f" {other}beside" for j, o in enumerate(options) if j != k for other in o.split())
        for question, options in zip(questions, choices, strict=True)
        for k, option in enumerate(options)
    ]
    seen, asked = _features(rows, half * width)
    hit = np.array([k == answer for answer, options in zip(right, choices, strict=True) for k in range(len(options))])
    model = LogisticRegression(C=0.3, max_iter=300).fit(seen, hit[: half * width])
    chosen = model.decision_function(asked).reshape(-1, width).argmax(-1)
    return float(np.mean(chosen == np.asarray(right)[half:]))
