"""Long-tailed image sets: how many images of each class, which ones, and where they lie.

All but the loader, its samplers and its augmentations is free of torch.
"""

from ltnorm.data.longtail import class_groups, long_tail_counts, report_groups

__all__ = ["class_groups", "long_tail_counts", "report_groups"]
