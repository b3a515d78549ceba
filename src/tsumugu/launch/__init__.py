"""Ways to start training and preparation: processes on this machine, a Slurm cluster, Amazon SageMaker."""
