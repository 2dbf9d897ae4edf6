"""Raises an error where a number would be wrong.

`models` checks modules before anything runs, and `graphs` checks autograd graphs. `limits` explains errors of torch,
`failures` errors of the user's model, and `loading` checks state dicts. Each message says what was found and what to
do.
"""
