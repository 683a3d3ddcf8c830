"""How good a tokenizer or a generator is: pictures in and out, metrics, sweeps and reports."""
