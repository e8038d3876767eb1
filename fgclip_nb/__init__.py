"""A notebook-first, reproducible laboratory for fine-grained vision-language training."""
__version__ = "0.1.0"
