"""How the ranks of a run are started, watched while they run, and started anew."""
