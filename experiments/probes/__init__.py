"""Measurements of a trained or training net: activations, shifts, spread over batches, folding."""
