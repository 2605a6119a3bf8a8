"""Networks with several classifiers, in inference: what each costs and is worth, and images that leave early."""
