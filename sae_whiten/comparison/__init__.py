"""SAEs trained with and without whitening, all else equal: plan, training, tests, report."""
