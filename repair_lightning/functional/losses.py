"""The losses of an edit: target cross-entropy, routing margins and intra-batch distillation.

Source: REPAIR, Sec. 2.3 (Eq. 4), Sec. 2.5 (Eq. 6, 7), Alg. 3 (AUTOREGCE, INTRABATCHKD, ROUTINGMARGIN).

Deviations: the mean of the cross-entropy over a target's tokens, not the sum, so that a long target is no louder edit;
Eq. 7's outer `min` is read as "this is minimised"; the teacher of Eq. 4 is constant in the cosine and the soft term, as
the convergence theorem takes it, but not in the variance term.

Shapes: B examples, T tokens, V vocabulary, D features, M irrelevant prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ._tensors import check_not_negative, check_positive, widen

IGNORED = -100  # the label of a position that is no target token


def target_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each example's target tokens, Eq. 6's `L_edit` per example.

    Args:
        logits: (B, T, V), any float type. Position t predicts `labels[:, t]`: nothing is shifted here.
        labels: (B, T) long, -100 where the position is no target token.

    Returns:
        (B,) nats per token in float32 or wider; 0 for an example without target tokens.
    """
    _check_labels(logits, labels)
    flat = widen(logits).flatten(0, 1)
    tokens = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="none").view_as(labels)
    return tokens.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)


def target_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """How safely greedy decoding says the target: the stopping rule of a write, positive where it does.

    Logits and labels are as for :func:`target_cross_entropy`.

    Returns:
        (B,) logit units: the smallest over the target tokens of (logit of the right token - best other logit). A
        forbidden target gives the lowest finite number, an example without target tokens +inf.
    """
    _check_labels(logits, labels)
    scores = widen(logits)
    lowest = torch.finfo(scores.dtype).min
    index = labels.clamp(min=0).unsqueeze(-1)
    right = scores.gather(-1, index).squeeze(-1)
    best_other = scores.scatter(-1, index, lowest).amax(dim=-1)
    margin = (right - best_other).clamp(min=lowest)
    return margin.masked_fill(labels == IGNORED, torch.inf).amin(dim=1)


@dataclass(frozen=True, slots=True)
class Margins:
    """Eq. 7's margins (gamma_1, gamma_2, gamma) in units of the activation score.

    Args:
        irrelevant: gamma_1, the score that irrelevant prompts should stay below; published 2 and 5.
        edit: gamma_2, the score that edits should exceed; published 20.
        gap: gamma, how far edits should lie above irrelevant prompts; published 10.
    """

    irrelevant: float
    edit: float
    gap: float

    def __post_init__(self) -> None:
        for name in ("irrelevant", "edit", "gap"):
            check_positive(f"margins.{name}", getattr(self, name), "the paper's are irrelevant=2, edit=20, gap=10")


def routing_margin_loss(edit_scores: Tensor, irrelevant_scores: Tensor, margins: Margins) -> Tensor:
    """Eq. 7: edits should wake their shard, irrelevant prompts should not.

    `mean (s_i - g1)+  +  mean (g2 - s_e)+  +  mean (g - (s_e - s_i))+`. The last mean runs over the pairs (edit b,
    irrelevant b) where there are equally many of both, as in Alg. 3, and over all B x M pairs where there are not.

    Args:
        edit_scores: (B,) activation scores `s_e`, B >= 1.
        irrelevant_scores: (M,) activation scores `s_i`, M >= 1.
        margins: in the unit of the scores.

    Returns:
        Scalar in the unit of the scores. A score has no gradient where its delta is exactly 0: on a fresh shard the
        edit loss has to make the first step.
    """
    for name, scores in (("edit_scores", edit_scores), ("irrelevant_scores", irrelevant_scores)):
        if scores.ndim != 1 or scores.numel() == 0:
            raise ValueError(
                f"{name} must have shape (n,) with n >= 1, got {tuple(scores.shape)}: "
                "leave the routing loss out where there is nothing to compare"
            )
    edit, irrelevant = widen(edit_scores), widen(irrelevant_scores)
    paired = edit.numel() == irrelevant.numel()
    gap = edit - irrelevant if paired else edit.unsqueeze(1) - irrelevant.unsqueeze(0)
    quiet = F.relu(irrelevant - margins.irrelevant).mean()
    loud = F.relu(margins.edit - edit).mean()
    apart = F.relu(margins.gap - gap).mean()
    return quiet + loud + apart


def kd_loss(features: Tensor, cosine_weight: float, variance_weight: float) -> tuple[Tensor, Tensor]:
    """Eq. 4 with Alg. 3's normalisers: pull the batch's features together and towards its first member, the teacher.

    `L = lambda / (B - 1) sum_{i >= 1} (1 - cos(o_i, o_0)) + theta / B sum_{i >= 0} ||o_i - mean||^2`, over the rows'
    directions `o_i`. The cosine distance is computed as `||o_i - o_0||^2 / 2`, which is the same and never negative.

    Args:
        features: (B, D), B >= 1, from behind the side memory; any non-zero length, row 0 is the teacher.
        cosine_weight: lambda, >= 0 (published 0.2 and 0.3).
        variance_weight: theta, >= 0 (not published).

    Returns:
        The loss (scalar) and each member's share before averaging, (B,): `lambda (1 - cos(o_i, o_0)) +
        theta ||o_i - mean||^2`, what FILTERANDRECLUSTER compares with its threshold. Both are 0 for B = 1.
    """
    _check_batch("features", features)
    check_not_negative("cosine_weight", cosine_weight, "0 leaves the term out")
    check_not_negative("variance_weight", variance_weight, "0 leaves the term out")
    directions = F.normalize(widen(features), dim=1)
    students = (directions[1:] - directions[0].detach()).square().sum(dim=1) / 2
    cosine = torch.cat([students.new_zeros(1), students])
    spread = (directions - directions.mean(dim=0)).square().sum(dim=1)
    loss = cosine_weight * cosine.sum() / max(len(students), 1) + variance_weight * spread.mean()
    return loss, cosine_weight * cosine + variance_weight * spread


def soft_kd_loss(logits: Tensor, temperature: float) -> Tensor:
    """Alg. 3, lines 23-25: the mean over the students of `KL(p_0 || p_i)` with `p = softmax(logits / T)`.

    As in the paper there is no factor T^2: its gradient shrinks about as 1 / T^2 where the usual one would not.

    Args:
        logits: (B, V), B >= 1; row 0 is the teacher.
        temperature: T > 0 (published 2).

    Returns:
        Scalar in nats; 0 for B = 1.
    """
    _check_batch("logits", logits)
    check_positive("temperature", temperature, "leave the soft term out instead of setting it to 0")
    log_p = F.log_softmax(widen(logits) / temperature, dim=1)
    teacher = log_p[0].detach()
    divergence = (teacher.exp() * (teacher - log_p[1:])).sum(dim=1)
    return divergence.sum() / max(len(divergence), 1)


def _check_batch(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 2 or len(tensor) == 0:
        raise ValueError(f"{name} must have shape (B, n) with B >= 1, got {tuple(tensor.shape)}: one row per edit")


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"labels must be (B, T) for logits (B, T, V), got {tuple(labels.shape)} for {tuple(logits.shape)}: "
            "align them first, logits[:, t] predict labels[:, t]"
        )
