"""What looks at the steps of a run from inside, on every rank, and may judge them before their update."""
