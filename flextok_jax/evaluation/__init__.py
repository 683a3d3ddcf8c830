"""How good a tokenizer is: pictures in and out, metrics, the digits' judge, and reports."""
