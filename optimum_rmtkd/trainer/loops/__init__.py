"""What `RMTKDLoop` is made of: a script's own loop with Accelerate, as the host of a run."""
