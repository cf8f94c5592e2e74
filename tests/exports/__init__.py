"""Programs of evaluation, read by other programs."""
