"""How a run gets onto machines: by SLURM, Kubernetes, Ray or ssh. Each starts `trainfleet train` once a host."""
