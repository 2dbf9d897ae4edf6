"""Computes L_g from the inner products of an engine: one call of the loss.

`settings` holds the options. `trial` checks a model by running it once; it uses `mixing` and `custom_functions`.
`comparison` is the call itself: statistics, chunks, weights, record. `similarity` is the mathematics, on plain tensors.
`gradient_buffer` forms the gradient chunk by chunk. `advice` warns of a term that does nothing.
"""
