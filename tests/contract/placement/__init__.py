"""What is reserved on a cluster of three nodes with declared GPUs. A package, because its fixture is: one for all."""
