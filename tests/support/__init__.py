"""What the tests share: the oracle, the zoo of models, and snapshots of state.  Nothing here imports the library."""
