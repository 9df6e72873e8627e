"""Who runs evaluations: this process, processes beside it, a Ray cluster or a SLURM cluster. One file each."""
