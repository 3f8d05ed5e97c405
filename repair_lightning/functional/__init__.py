"""The method's mathematics: tensors in, tensors out. Knows torch and nothing else of this project.

A `ValueError` refuses what lies outside the documented shapes and ranges, a `TypeError` a mask that is not boolean.
"""

from .fusing import fused_delta
from .losses import IGNORED, Margins, kd_loss, routing_margin_loss, soft_kd_loss, target_cross_entropy, target_margin
from .masks import bernoulli_mask, pack_mask, pack_values, unpack_mask, unpack_values
from .routing import Pool, activation_scores, calibrate_threshold, decide, ratio_threshold, sketch, sketched_scores
from .ties import Normalize, loss_weights, ties_merge, trim
