"""The training loop: programs, order of the images, evaluation, checkpoints."""
