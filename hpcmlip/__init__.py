"""hpcmlip: multi-fidelity machine-learning interatomic potentials from the ANI data sets, on a laptop or a cluster."""

__version__ = "0.1.0"
