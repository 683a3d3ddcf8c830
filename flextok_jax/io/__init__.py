"""All that touches a file: paths, weights, checkpoints, workdirs."""
