"""No number rather than a wrong one: what is refused, and how it is said.

`models` looks at modules before anything runs, `graphs` at autograd graphs, `limits` at what torch says, `failures` at
errors of the user's own model, `loading` at state dicts. Each message names what was found and the remedy.
"""
