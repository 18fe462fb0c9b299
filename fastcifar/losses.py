"""Logits [B, C] and the labels of a (possibly mixed) batch enter, the mean loss leaves."""

import torch.nn.functional as F
from torch import Tensor


def mixed_cross_entropy(
    logits: Tensor, labels: Tensor, partner_labels: Tensor, share: Tensor, label_smoothing: float
) -> Tensor:
    """Cross-entropy against `share` of the label and the rest of the partner's, smoothed once.

        loss = share * CE(logits, labels) + (1 - share) * CE(logits, partner_labels)

    Both terms carry the same smoothed floor, so the target share * y + (1 - share) * y' sums to 1, smoothed once.
    logits: [B, C] any float, computed in float32. labels, partner_labels: [B] int64. share: scalar tensor in 0..1.
    """
    logits = logits.float()
    own = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    partner = F.cross_entropy(logits, partner_labels, label_smoothing=label_smoothing)
    return share * own + (1 - share) * partner
