"""hpcmp: train and run transformers too large for one device, as a batch job under mpirun or srun."""

__version__ = "0.1.0"
