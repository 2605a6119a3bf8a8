"""Augmentation on whole batches: what the policies of `shoal.data.augment` are made of."""
