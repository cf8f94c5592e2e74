"""Probes of a trained or training network: activations, shifts, spread over batches, folding."""
