"""See what works: on this machine, on the way to another, in a run; and what to turn where it does not."""
