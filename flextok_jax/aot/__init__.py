"""Programs compiled ahead of time for TPUs that are not here: what the compiler says of them."""
