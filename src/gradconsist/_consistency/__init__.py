"""From inner products to L_g: one call of the loss.

`settings` are the options. `trial` finds out about a model by running it once. `comparison` is the call: statistics,
chunks, weights, record. `similarity` is the mathematics, pure tensors. `gradient_buffer` forms the gradient chunk by
chunk. `advice` warns of a term that does nothing.
"""
